"""The speed of all data preparation in one run: the guard, the filters and the search for near duplicates.

    python -m benchmarks.data_tools --out benchmarks/results/data_tools.json

Runs benchmarks.download_guard, benchmarks.filters and benchmarks.dedup, each as its own command, and puts their figures
beside the targets into one JSON and one table. Takes about ten minutes on two otherwise idle cores. --quick tries every
part in a minute; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import machine
from pretrain.command import about, make_parser, run, write

# Arguments of each part, in a full run and with --quick.
PARTS = {
    "download_guard": ("--pictures 4000 --repeats 5", "--pictures 400 --repeats 1"),
    "filters": ("--rows 1e7 --pictures 4000", "--rows 2e5 --pictures 200"),
    "dedup": ("--hashes 1e4 1e5 1e6 --pictures 200", "--hashes 1e3 1e4 --pictures 10"),
}
MOST_GUARD_PERCENT, MOST_MIB = 5, 2048


class Figure(NamedTuple):
    name: str
    value: str
    target: str = ""


def measure(part: str, arguments: str) -> dict[str, Any]:
    """The JSON of one part. Raises ValueError if it failed, after it has printed why."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "part.json")
        line = [sys.executable, "-m", f"benchmarks.{part}", *arguments.split(), "--out", str(out)]
        command = " ".join(["python", *line[1:-2]])
        print(f"running {command}", file=sys.stderr, flush=True)
        load = os.getloadavg()[0]  # of other processes, which make every figure worse
        if code := subprocess.run(line, stdout=subprocess.DEVNULL, check=False).returncode:
            raise ValueError(f"benchmarks.{part} ended with code {code}; run it alone: {command}")
        return {**json.loads(out.read_bytes()), "command": command, "load_before": round(load, 2)}


def figures(results: dict[str, dict[str, Any]]) -> list[Figure]:
    """The lines of the table."""
    guard, filters, dedup = (results[part] for part in PARTS)
    rows, pictures = filters["filter_list"], filters["filter_shards"]
    lines = [
        Figure("download, img2dataset alone", f"{guard['alone_img_per_s']:.0f} img/s"),
        Figure("download, guarded", f"{guard['guarded_img_per_s']:.0f} img/s"),
        Figure("the guard costs", f"{guard['guard_costs_percent_of_img_per_s']} %", f"at most {MOST_GUARD_PERCENT} %"),
        Figure("the same in CPU time", f"{guard['guard_costs_percent_of_cpu_ms_per_img']} %"),
        Figure(f"filter_list, {rows['rows']:,} rows", f"{rows['rows_per_s']:,} rows/s"),
        Figure("its peak memory", f"{rows['peak_mib']:,.0f} MiB", f"below {MOST_MIB} MiB"),
        Figure(f"filter_shards, {pictures['side']} pixels", f"{pictures['pictures_per_s']:,} pictures/s"),
    ]
    sizes = dedup["rows"]
    for size in sizes:
        value = f"{size['cpu_seconds']:.2f} s of CPU, {size['memory_mib']:,.0f} MiB"
        lines.append(Figure(f"near duplicates of {size['hashes']:,} hashes", value))
    for small, large in itertools.pairwise(sizes):
        name = f"growth from {small['hashes']:,} to {large['hashes']:,} hashes"
        lines.append(Figure(name, f"n^{_exponent(small, large):.2f} in CPU time", "near n^1"))
    return lines


def _exponent(small: dict[str, float], large: dict[str, float]) -> float:
    times, sizes = ((large[name], small[name]) for name in ("cpu_seconds", "hashes"))
    return math.log(max(times[0], 1e-3) / max(times[1], 1e-3)) / math.log(sizes[0] / sizes[1])


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.data_tools", __doc__, "--quick")
    parser.add_argument("--quick", action="store_true", help="try every part on little data; the figures mean nothing")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    results = {part: measure(part, words[args.quick]) for part, words in PARTS.items()}
    lines = figures(results)
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{line.name:{width}}  {line.value:>30}  {line.target}".rstrip())
    facts = about("benchmarks.data_tools", arguments) | machine("pyarrow", "numpy")
    write({**results, **facts}, args.out, show=False)


if __name__ == "__main__":
    sys.exit(main())
