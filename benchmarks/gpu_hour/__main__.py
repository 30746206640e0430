"""Every figure that needs a GPU, in parts that fit ten minutes. benchmarks/README.md says what to carry to a machine
without a network.

    python -m benchmarks.gpu_hour throughput --seconds 540 --out results

A part is a list of cells (benchmarks/gpu_hour/cells.py), the most telling first. Each runs in a process of its own with
a limit, and OUT/PART.json is written after each. Run the same line again to go on: cells that are done are not run
again, and those that failed are tried after those that were not tried yet. Exit code 1: a cell failed.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from benchmarks.gpu_hour.cells import PARTS
from benchmarks.gpu_hour.runner import Results, as_json, run_cells
from pretrain import command
from pretrain.lock import Lock
from pretrain.settings import nearest


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command.make_parser("benchmarks.gpu_hour", __doc__, "ceilings --seconds 300 --out results")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=540, help="no cell runs longer than that (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_hour"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="these only (default: all of the part)")
    parser.add_argument("--toy", action="store_true", help="so small that a CPU does it; the figures mean nothing")
    parser.add_argument("--list", action="store_true", help="print the cells' lines and run nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return command.run(lambda: _run(args), state=f"finished cells are in {args.out / args.part}.json")


def _run(args: argparse.Namespace) -> int:
    if not args.seconds > 0:
        raise ValueError(f"--seconds={args.seconds:g} is no time; use more than 0, such as 540")
    cells = PARTS[args.part]
    names = [cell.name for cell in cells]
    for name in args.cells or ():
        if name not in names:
            raise ValueError(f"--cells {name!r} is not in the part {args.part}{nearest(name, names)}")
    chosen = [cell for cell in cells if args.cells is None or cell.name in args.cells]
    if args.list:
        print(as_json(chosen, args.toy))
        return 0
    signal.signal(signal.SIGTERM, _stop)  # so that the cell that runs ends with this process
    path = args.out / f"{args.part}.json"
    with Lock(args.out):
        results = Results(path, args.part, args.toy)
        left = run_cells(chosen, results, args.out / "logs" / args.part, args.seconds, args.toy, _tell)
    _tell(f"{len(chosen) - len(left)} of {len(chosen)} cells are done: {path}")
    if left:
        names = [f"{name} (failed)" if failed else name for name, failed in left.items()]
        _tell(f"not done: {'; '.join(names)}; run the same line again to go on")
    return int(any(left.values()))


def _tell(line: str) -> None:
    print(line, flush=True)


def _stop(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
