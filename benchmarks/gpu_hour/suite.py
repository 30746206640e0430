"""Runs tests and writes what became of each as JSON. Ends with 1 where one failed, and where none ran.

python -m benchmarks.gpu_hour.suite --out tests.json -m cuda tests/cuda
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import machine
from pretrain import command
from pretrain.command import about, write

MOST = 2000  # characters of a failure that are kept


class Outcomes:
    """A plugin of pytest's. `failed`: name -> the end of what was said; `skipped`: name -> why."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.note(report)

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported."""
        if report.outcome != "passed":
            self.note(report)

    def note(self, report: Any) -> None:
        self.counts[report.outcome] += 1
        if report.outcome == "failed":
            self.failed[report.nodeid] = str(report.longrepr)[-MOST:]
        elif report.outcome == "skipped":
            self.skipped[report.nodeid] = str(report.longrepr[-1] if report.longrepr else "")[:MOST]


def main(argv: list[str] | None = None) -> int:
    parser = command.make_parser("benchmarks.gpu_hour.suite", __doc__, "-m cuda tests/cuda")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args, given = parser.parse_known_args(argv)
    return command.run(lambda: _run(args, given, argv), state="nothing was written")


def _run(args: argparse.Namespace, given: list[str], argv: list[str] | None) -> int:
    outcomes = Outcomes()
    code = pytest.main([*given, "-p", "no:cacheprovider"], plugins=[outcomes])
    facts = about("benchmarks.gpu_hour.suite", argv) | machine("torch", "pytest") | {"machine": platform.machine()}
    counts = {name: outcomes.counts[name] for name in ("passed", "failed", "skipped")}
    write({**facts, **counts, "failures": outcomes.failed, "skips": outcomes.skipped}, args.out)
    return int(code != 0 or not outcomes.counts["passed"])


if __name__ == "__main__":
    sys.exit(main())
