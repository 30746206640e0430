"""What a save costs a run: how long training stands still, and how much longer the steps take while it is written.

    python -m benchmarks.checkpoint_stall --recipe beit3_base --stage pretrain --ds ds_configs/zero1.json \\
        --set batch.images=2 --set batch.pairs=2 --set batch.texts=2 --set batch.accumulation=1

Real steps on synthetic shards (see benchmarks.throughput) and real checkpoints in --work, in one process. In each round
a checkpoint is saved plainly and another one in the background, in turns. `stall_s` is the time of the save's call,
`stall_steps` that by the median step with nothing behind it. `lost_steps` adds what the steps took longer while the
checkpoint was written, which on a machine without spare cores is most of the cost; a plain save loses its stall.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.record import machine
from benchmarks.throughput import parameters, write_shards, write_visual_tokenizer
from pretrain.checkpoint.directory import Retention
from pretrain.checkpoint.saver import BUSY, Saver
from pretrain.command import about, make_parser, run, write
from pretrain.parallel.faults import Watch
from pretrain.recipes import load_recipe
from pretrain.run.build import Run, build_run

WAYS = {"plain": False, "background": True}
MOST_STEPS = 10**6


class Save(NamedTuple):
    """Seconds: of the call, from it until the checkpoint is complete, and of each step meanwhile."""

    stall: float
    whole: float
    steps: list[float]


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The figures so far, after each round."""
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is below 1; use 1 or more")
    with tempfile.TemporaryDirectory(prefix="checkpoint_stall", dir=args.work) as name:
        place = Path(name)
        os.environ["DATA"] = str(place)
        write_shards(place, stage, args.samples)
        write_visual_tokenizer(recipe, stage, place)
        watch = Watch()
        run = build_run(recipe, replace(stage, init_from=None), args.ds, place, watch)
        try:
            yield from take_turns(run, watch, place, args.rounds, args.steps)
        finally:
            watch.stop()


def take_turns(run: Run, watch: Watch, place: Path, rounds: int, steps: int) -> Iterator[dict[str, Any]]:
    """Saves in both ways by turns, each after `steps` quiet steps -> the figures so far, after each round."""
    take = stepper(run, run.loader.batches(0, MOST_STEPS))
    take()  # makes AdamW's moments
    savers = {
        way: Saver(run.engine, place / way, watch, mesh=run.mesh, background=background)
        for way, background in WAYS.items()
    }
    quiet: list[float] = []
    saves: dict[str, list[Save]] = {way: [] for way in WAYS}
    # The first round makes the copies' memory, and counts for `first_stall_s` only.
    for number in range(rounds + 1):
        for way in sorted(WAYS, reverse=bool(number % 2)):
            quiet += [take() for _ in range(steps)]
            saves[way].append(_save(savers[way], number + 1, take))
        if number:
            files = [path for path in (place / "background").rglob("*") if path.is_file()]
            step = statistics.median(quiet)
            yield {
                "parameters": parameters(run),
                "checkpoint_gib": round(sum(path.stat().st_size for path in files) / 2**30, 3),
                "batch": run.stage.batch.counts(),
                "rounds": number,
                "step_s": round(step, 3),
                **{way: _figures(of_way, step) for way, of_way in saves.items()},
            }


def stepper(run: Run, batches: Iterator[Any]) -> Callable[[], float]:
    """A function that takes a step of the run and gives its seconds."""
    first = True

    def take() -> float:
        nonlocal first
        micro_batches, start = next(batches), time.perf_counter()
        run.step(micro_batches, first=first)
        first = False
        return time.perf_counter() - start

    return take


def _save(saver: Saver, step: int, take: Callable[[], float]) -> Save:
    """Saves, and takes steps while the checkpoint is being written."""
    start = time.perf_counter()
    saver.save(step, {}, Retention(1))
    stall, during = time.perf_counter() - start, []
    while saver.state == BUSY:
        during.append(take())
        saver.advance(saver.state)
    saver.finish()
    return Save(stall, time.perf_counter() - start, during)


def _figures(saves: list[Save], step: float) -> dict[str, Any]:
    first, *rest = saves
    stall = statistics.median(save.stall for save in rest)
    lost = statistics.median(save.stall + sum(save.steps) - step * len(save.steps) for save in rest)
    return {
        "first_stall_s": round(first.stall, 3),
        "stall_s": round(stall, 3),
        "stall_steps": round(stall / step, 3),
        "lost_steps": round(lost / step, 3),
        "written_in_s": round(statistics.median(save.whole for save in rest), 3),
        "steps_meanwhile": statistics.median(len(save.steps) for save in rest),
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    example = "--recipe tiny --stage vision --ds ds_configs/zero1.json --rounds 1"
    parser = make_parser("benchmarks.checkpoint_stall", __doc__, example)
    parser.add_argument("--recipe", default="beit3_base", help="(%(default)s)")
    parser.add_argument("--stage", default="pretrain", help="(%(default)s)")
    parser.add_argument("--ds", default="ds_configs/zero1.json", help="(%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in training")
    parser.add_argument("--rounds", type=int, default=5, help="of saves in both ways (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="quiet ones before each save (%(default)s)")
    parser.add_argument("--samples", type=int, default=16, help="in each shard (%(default)s)")
    parser.add_argument(
        "--work", type=Path, help="a directory on the disk to write to (default: that of temporary files)"
    )
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    return run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    facts = {**about("benchmarks.checkpoint_stall", argv), **machine("torch", "deepspeed")}
    figures: dict[str, Any] = {}
    for figures in measure(args):
        write({**facts, **figures}, args.out, show=False)  # what is measured stays, whenever it ends
    print(json.dumps({**facts, **figures}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
