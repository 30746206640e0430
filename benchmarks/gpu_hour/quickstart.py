"""The quickstart on this machine: its seconds, and what each stage reached.

python -m benchmarks.gpu_hour.quickstart --run-dir runs/gpu_hour
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import machine
from pretrain import command
from pretrain.command import about, write
from pretrain.json_files import read_json
from pretrain.recipes import tiny

ROOT = Path(__file__).parents[2]


def measure(run_dir: Path, given: list[str]) -> dict[str, Any]:
    """Runs launch/quickstart.sh with the arguments `given`. Raises ValueError where it fails; it has said why."""
    begin = time.monotonic()
    mine = {"IMGLISH_PYTHON": sys.executable, "QUICKSTART_DIR": str(run_dir.absolute())}
    done = subprocess.run(["bash", "launch/quickstart.sh", *given], cwd=ROOT, env=os.environ | mine, check=False)
    if done.returncode:
        raise ValueError(f"launch/quickstart.sh ended with exit code {done.returncode}, as its last lines say")
    return {"seconds": round(time.monotonic() - begin, 1), "stages": reached(run_dir)}


def reached(run_dir: Path) -> dict[str, dict[str, Any]]:
    """Stage -> its eval.json, of those that were evaluated."""
    files = {stage: run_dir / stage / "eval.json" for stage in tiny.RECIPE.stages}
    return {stage: read_json(file) for stage, file in files.items() if file.exists()}


def main(argv: list[str] | None = None) -> int:
    parser = command.make_parser("benchmarks.gpu_hour.quickstart", __doc__, "--run-dir runs/gpu_hour")
    parser.add_argument("--run-dir", type=Path, help="a run to begin or to go on with (default: one that is removed)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of each stage")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    settings = [word for setting in args.set for word in ("--set", setting)]
    with tempfile.TemporaryDirectory(prefix="quickstart") as name:
        result = measure(args.run_dir or Path(name), settings)
    facts = about("benchmarks.gpu_hour.quickstart", argv) | machine("torch", "deepspeed")
    write(facts | result, args.out)


if __name__ == "__main__":
    sys.exit(main())
