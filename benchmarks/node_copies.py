"""Copies on the nodes (--set copy_every=1): what they cost a step, and what they save where a node is lost.

    python -m benchmarks.node_copies --out benchmarks/results/node_copies.json

Two ranks on this machine are two nodes, each with a directory of its own for its copies. `cost`: steps of --recipe with
a copy begun after each (left out while the one before is being written) and steps without, in turns, in the same
processes. What is counted are CPU seconds, of the thread that trains, for which a step waits, and of all threads: here
ranks share the cores with what copies, and by the wall's clock wait for it as they would not on a node with cores to
spare. `loss`: a small run saves every --save-every steps to its run directory; at about three quarters of that both
ranks are killed, one node's directory is removed, and the run is started again: seconds from the kill until it is
further than before, with copies and without, in turns. Medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.checkpoint_stall import MOST_STEPS, stepper
from benchmarks.record import machine
from benchmarks.throughput import parameters, write_shards, write_visual_tokenizer
from pretrain.checkpoint.copies import LOCAL, open_copies
from pretrain.checkpoint.saver import IDLE, Saver
from pretrain.command import about, make_parser, run, write
from pretrain.distributed import device, gather_objects, highest, rank
from pretrain.lives import read_lives
from pretrain.metrics import last_step
from pretrain.parallel.faults import Watch
from pretrain.recipes import load_recipe
from pretrain.run.build import build_run
from tests.distributed import run_ranks
from tests.small_run import Ranks, command, tokenizer_of, train_stage, write_data

WAYS, STAGE = ("without", "with"), "fusion"


def be_node(place: Path, number: int) -> None:
    """Makes this process one of node `number`, whose copies lie below `place`."""
    os.environ.update({LOCAL: str(place / f"node{number}"), "SLURMD_NODENAME": f"node{number}"})


def rank_cost(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """The figures of `cost`, on each of two ranks."""
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    os.environ["DATA"] = str(place)
    be_node(place, rank())
    (place / "stage").mkdir(exist_ok=True)
    watch = Watch()
    built = build_run(recipe, replace(stage, init_from=None), args.ds, place, watch)
    take = stepper(built, built.loader.batches(0, MOST_STEPS))
    saver = Saver(built.engine, place / "stage", watch, mesh=built.mesh, copies=open_copies(place / "stage", 0))
    rounds: list[dict[str, Spent]] = []
    step = 0
    # The first round makes AdamW's moments and the copies' memory, and is not counted.
    for number in range(args.rounds + 1):
        rounds.append({})
        for way in sorted(WAYS, reverse=bool(number % 2)):
            wall, begun = [], 0
            own, whole = time.thread_time(), time.process_time()
            for _ in range(args.steps):
                start, step = time.perf_counter(), step + 1
                take()
                saver.advance(highest([saver.state], device())[0])
                if way == "with":
                    before = saver.step
                    saver.copy(step, {})
                    begun += int(saver.step != before)
                wall.append(time.perf_counter() - start)
            saver.finish()
            spent = gather_objects((time.thread_time() - own, time.process_time() - whole))
            own_s, whole_s = (statistics.fmean(each) for each in zip(*spent, strict=True))
            rounds[-1][way] = Spent(own_s, whole_s, begun, statistics.median(wall))
    watch.stop()
    gib = max(gather_objects(saver.gib))
    return {"parameters": parameters(built), "failed": saver.state != IDLE, "gib_of_a_rank": round(gib, 3)} | summary(
        rounds[1:], args.steps, gib
    )


class Spent(NamedTuple):
    """What the steps of one round and way took, in the mean of the ranks. CPU seconds are of all these steps."""

    own_s: float  # of the thread that trains
    whole_s: float  # of all threads
    copies: int  # that were begun
    step_s: float  # median, by the wall's clock


def summary(rounds: Sequence[Mapping[str, Spent]], steps: int, gib: float) -> dict[str, Any]:
    """The figures, with the least and the most of the rounds beside each median."""
    extra: dict[str, list[float]] = {"own": [], "whole": []}
    for each in rounds:
        copies = max(each["with"].copies, 1)
        extra["own"].append((each["with"].own_s - each["without"].own_s) / copies)
        extra["whole"].append((each["with"].whole_s - each["without"].whole_s) / copies)
    plain = statistics.median(each["without"].whole_s / steps for each in rounds)
    return {
        "cpu_s_of_a_step": round(plain, 4),
        "cpu_s_of_a_copy": _spread(extra["whole"]),
        "cpu_s_of_a_copy_that_a_step_waits_for": _spread(extra["own"]),
        "of_a_step": _spread([own / plain for own in extra["own"]]),
        "cpu_s_per_gib": round(statistics.median(extra["whole"]) / gib, 2),
        "copies_in_a_round": _spread([float(each["with"].copies) for each in rounds]),
        "steps_in_a_round": steps,
        "wall_s_of_a_step": {way: _spread([each[way].step_s for each in rounds]) for way in WAYS},
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    spread = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: round(value, 4) for name, value in spread.items()}


def loss(args: argparse.Namespace, data: Path, place: Path, way: str) -> dict[str, float]:
    """One run that loses a node: the seconds until it is further than before, and the steps that it takes again."""
    steps, struck_at = 2 * args.save_every, 3 * args.save_every // 4
    line = command(data, place / "run", STAGE, tokenizer_of(data), f"steps={steps}", ds="zero1.json")
    for setting in (f"save_every={args.save_every}", f"copy_every={int(way == 'with')}", "trace_samples=false"):
        line += ["--set", setting]
    stage, log = place / "run" / STAGE, place / "log"
    ranks = Ranks(line, data, 2, log, partial(be_node, place))
    wait_until(lambda: last_step(stage) >= struck_at, log)
    ranks.kill()
    start, reached = time.monotonic(), last_step(stage)
    shutil.rmtree(place / "node1", ignore_errors=True)
    ranks = Ranks(line, data, 2, log, partial(be_node, place))
    try:
        wait_until(lambda: len(read_lives(stage)) > 1 and last_step(stage) > reached, log)
        return {"seconds": time.monotonic() - start, "steps": read_lives(stage)[1].repeated}
    finally:
        ranks.kill()


def wait_until(condition: Any, log: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise ValueError(f"the run came no further within {seconds:.0f} s: {log.read_text()[-2000:]}")
        time.sleep(0.02)


def losses(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    data = write_data(place / "data")
    if (done := train_stage(data, data / "start", "tokenizer", CUDA_VISIBLE_DEVICES="")).returncode:
        raise ValueError(f"the tokenizer of the runs could not be trained: {done.stderr[-500:]}")
    outcomes: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(args.rounds):
        for way in sorted(WAYS, reverse=bool(number % 2)):
            own = place / f"{way}{number}"
            own.mkdir()
            outcomes[way].append(loss(args, data, own, way))
    return {
        f"{way} copies": {
            "seconds": round(statistics.median(each["seconds"] for each in of_way), 2),
            "steps_done_again": statistics.median(each["steps"] for each in of_way),
        }
        for way, of_way in outcomes.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.node_copies", __doc__, "--rounds 2")
    parser.add_argument("--recipe", default="tiny", help="of `cost` (%(default)s)")
    parser.add_argument("--stage", default=STAGE, help="of `cost` (%(default)s)")
    parser.add_argument("--ds", default="ds_configs/zero1.json", help="of `cost` (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in training, of `cost`")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="of `cost`, in each round and way (%(default)s)")
    parser.add_argument("--save-every", type=int, default=200, help="of `loss` (%(default)s)")
    parser.add_argument("--work", type=Path, help="a directory for all files (default: that of temporary files)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    for name in ("rounds", "steps", "save_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(args, name)} is below 1; use 1 or more")
    facts = about("benchmarks.node_copies", arguments) | machine("torch", "deepspeed")
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    with tempfile.TemporaryDirectory(prefix="node_copies", dir=args.work) as name:
        place = Path(name)
        os.environ["DATA"] = str(place / "cost")
        write_shards(place / "cost", stage, 16)
        write_visual_tokenizer(recipe, stage, place / "cost")
        cost, _ = run_ranks(rank_cost, 2, args, place / "cost", timeout=1800)
        write(facts | {"cost": cost, "loss": losses(args, place)}, args.out)


if __name__ == "__main__":
    sys.exit(main())
