"""Which settings are fastest here, of those that fit: micro-batch, ZeRO, checkpointing, compile and workers.

    python -m benchmarks.sweep --recipe beit3_base --stage pretrain --ds ds_configs/zero1_bf16.json \\
        ds_configs/zero3_bf16.json --accumulation 8 4 2 --checkpointing 0 1 --out runs/sweep -- --stored-codes \\
        --set batch.images=512 --set batch.pairs=512 --set batch.texts=512

Each cell is a run of benchmarks.throughput (what follows `--` goes to each) in a process of its own with a limit. None
of these settings changes what a run is: the batch stays the same, batch.accumulation says in how many micro-batches.
Every --ds, --checkpointing and --compile is tried with the micro-batches from small to large, until one fills the
memory: larger ones are left out then. At the end the fastest is tried with every number of --workers. OUT/sweep.json
is written after each cell and OUT/sweep.svg at the end; run the same line again to go on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.bars import write_bars
from benchmarks.gpu_hour.cells import Cell
from benchmarks.gpu_hour.runner import LEAST_S, Results, run_cell, summary
from pretrain import command
from pretrain.lock import Lock

MODULE = "benchmarks.throughput"
# How a cell ends that does not fit: by the sentence of training for a full GPU, or killed for the host's memory.
FULL, KILLED = "memory is full", (-9, 137)
LEFT_OUT = "left out: a smaller micro-batch did not fit"


@dataclass(frozen=True)
class Choice:
    """The settings of a cell; `workers` None: the recipe's."""

    ds: str
    checkpointing: int
    compile: bool
    accumulation: int
    workers: int | None = None

    @property
    def words(self) -> list[str]:
        """As one adds them to a line of pretrain.train."""
        settings = {
            "batch.accumulation": self.accumulation,
            "activation_checkpointing": self.checkpointing,
            "compile": str(self.compile).lower(),
        }
        settings |= {} if self.workers is None else {"loading.workers": self.workers}
        return ["--ds", self.ds, *itertools.chain(*(("--set", f"{name}={value}") for name, value in settings.items()))]

    @property
    def name(self) -> str:
        parts = [Path(self.ds).stem, f"accumulation {self.accumulation}"]
        parts += [f"checkpointing {self.checkpointing}"] if self.checkpointing else []
        parts += ["compiled"] if self.compile else []
        parts += [] if self.workers is None else [f"{self.workers} workers"]
        return ", ".join(parts)

    def cell(self, args: argparse.Namespace) -> Cell:
        launcher = ["torch.distributed.run", "--nproc-per-node", str(args.ranks), "-m"] if args.ranks > 1 else []
        line = [*launcher, MODULE, "--recipe", args.recipe, "--stage", args.stage, *self.words, *args.more]
        return Cell(self.name, shlex.join(line), "", args.limit)


class Sweep:
    """The cells of one sweep, as far as `results` has them."""

    def __init__(self, args: argparse.Namespace, results: Results):
        self.args, self.results = args, results
        self.end = time.monotonic() + args.seconds
        self.tried: list[Choice] = []

    def run(self) -> bool:
        """Whether every cell was tried."""
        for group in groups(self.args):
            full = False
            for choice in group:
                if not full and not self.try_one(choice):
                    return False
                if full:
                    self.leave_out(choice)
                full = full or does_not_fit(self.value(choice))
        if (best := self.best()) is None or not self.args.workers:
            return True
        return all(
            self.try_one(Choice(best.ds, best.checkpointing, best.compile, best.accumulation, count))
            for count in self.args.workers
        )

    def value(self, choice: Choice) -> dict[str, Any]:
        cell = choice.cell(self.args)
        return self.results.of(cell, cell.words(False)) or {}

    def try_one(self, choice: Choice) -> bool:
        """Runs the cell of a choice, unless it is done. False where the time is over."""
        cell = choice.cell(self.args)
        self.tried.append(choice)
        known = self.value(choice)
        if known.get("ended") == 0 or does_not_fit(known):
            return True
        left = self.end - time.monotonic()
        if left < LEAST_S:
            return False
        value = run_cell(cell, cell.words(False), self.args.out / "logs", left)
        self.results.put(cell, value)
        tell(summary(cell, value))
        return True

    def leave_out(self, choice: Choice) -> None:
        cell = choice.cell(self.args)
        self.tried.append(choice)
        self.results.put(cell, {"command": cell.words(False), "ended": LEFT_OUT, "seconds": 0.0})

    def speeds(self) -> dict[Choice, float | None]:
        """Samples a second; None: no figure."""
        return {choice: self.value(choice).get("result", {}).get("samples_per_s") for choice in self.tried}

    def best(self) -> Choice | None:
        """The fastest with the recipe's workers."""
        speeds = {
            choice: speed for choice, speed in self.speeds().items() if speed is not None and choice.workers is None
        }
        return max(speeds, key=lambda choice: speeds[choice], default=None)


def groups(args: argparse.Namespace) -> Iterator[list[Choice]]:
    """Choices that differ only in their micro-batch, the smallest first."""
    for ds, checkpointing, compiled in itertools.product(args.ds, args.checkpointing, args.compile):
        sizes = sorted(set(args.accumulation), reverse=True)
        yield [Choice(ds, checkpointing, compiled == "true", size) for size in sizes]


def does_not_fit(value: dict[str, Any]) -> bool:
    ended = value.get("ended")
    return ended == LEFT_OUT or ended in KILLED or (ended not in (0, None) and FULL in value.get("said", ""))


def tell(line: str) -> None:
    print(line, flush=True)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    own, more = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = command.make_parser("benchmarks.sweep", __doc__, "--recipe tiny --stage fusion --accumulation 4 2 1")
    parser.add_argument("--recipe", default="beit3_base")
    parser.add_argument("--stage", default="pretrain")
    parser.add_argument("--ds", nargs="+", default=["ds_configs/zero1_bf16.json"])
    parser.add_argument("--accumulation", nargs="+", type=int, default=[8, 4, 2, 1])
    parser.add_argument("--checkpointing", nargs="+", type=int, default=[0])
    parser.add_argument("--compile", nargs="+", choices=("true", "false"), default=["true"])
    parser.add_argument("--workers", nargs="+", type=int, default=[], help="for the fastest of the others")
    parser.add_argument("--ranks", type=int, default=1, help="of this node, by torchrun (%(default)s)")
    parser.add_argument("--limit", type=int, default=300, help="seconds of a cell (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="no cell runs longer than that (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"), metavar="DIR", help="(%(default)s)")
    args = parser.parse_args(own)
    args.more, args.line = more, shlex.join(["python", "-m", "benchmarks.sweep", *argv])
    return args


def _run(args: argparse.Namespace) -> int:
    for name, least in {"accumulation": 1, "checkpointing": 0, "workers": 0, "ranks": 1, "limit": 1}.items():
        value = getattr(args, name)
        if (low := min(value, default=least) if isinstance(value, list) else value) < least:
            raise ValueError(f"--{name}={low} is below {least}; use {least} or more")
    if not args.seconds > 0:
        raise ValueError(f"--seconds={args.seconds:g} is no time; use more than 0, such as 3600")
    with Lock(args.out):
        sweep = Sweep(args, Results(args.out / "sweep.json", "sweep", False))
        finished = sweep.run()
    speeds = sweep.speeds()
    bars = {choice.name: speed for choice, speed in speeds.items()}
    write_bars(args.out / "sweep.svg", "Samples a second", bars, mark=None, note=args.line)
    known = {choice: speed for choice, speed in speeds.items() if speed is not None}
    for choice in sorted(known, key=lambda each: -known[each])[:5]:
        tell(f"{known[choice]:10.2f} samples/s  {shlex.join(choice.words)}")
    if not known:
        tell(f"no cell gave a figure; {args.out / 'logs'} has what they said")
    if not finished:
        tell("the time was over before every cell was tried; run the same line again to go on")
    return int(not known)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return command.run(lambda: _run(args), state=f"finished cells are in {args.out / 'sweep.json'}")


if __name__ == "__main__":
    sys.exit(main())
