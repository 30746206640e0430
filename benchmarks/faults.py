"""Runs that are struck again and again, from a seeded schedule, and what they end with against runs left alone.

    python -m benchmarks.faults --faults 1000 --out benchmarks/results/faults.json

A fault counts when it struck:
  kill    SIGKILL before, amid or after the chosen file-system call on the run's directory, or at a moment of a step
  errno   that call failed with ENOSPC, EIO, EROFS or ESTALE, once or from then on, until the life's end
  signal  SIGTERM or SIGUSR1 at that call, and the run ended with the code for it
  damage  a bit flipped, a file cut, zeroed, deleted or added in the newest checkpoint, which was good until then, and
          the next life refused it by name (or, with a file added, took it)
  layout  the run went on from a checkpoint of other ranks or another ZeRO stage

A run goes on from life to life with the same line until it is finished. Then weights, the optimizer's and the
generators' state, metrics.jsonl (without what a clock measured) and the samples of each rank must be equal to the bit;
where the layout changed on the way, the samples of each step, and losses and weights to rounding.

The calls that open, write, sync, rename, remove, make or cut files and directories are struck, in the C library, below
Python and Rust; calls that read or list are not. A killed process leaves what it wrote to the system: what a loss of
power takes is not tried here. From the repository's root, on Linux, with a C++ compiler. Finished runs stand in
WORK/finished.jsonl, and the same command goes on after them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.fault_runs.compare import ROUNDING
from benchmarks.fault_runs.run import FaultyRun, left_alone, prepare, start_server
from benchmarks.fault_runs.schedule import CHANGING, KINDS_OF_RUN, Schedule
from benchmarks.fault_runs.strike import build, preload
from benchmarks.record import machine
from pretrain.command import about, make_parser, run, write
from pretrain.files import Lines, write_file
from pretrain.lock import Lock

FINISHED = "finished.jsonl"
KINDS = ("kill", "errno", "signal", "damage", "layout")


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.faults", __doc__, "--faults 20 --work runs/faults")
    parser.add_argument("--faults", type=int, default=1000, metavar="N", help="that strike, at least (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/faults"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    state = f"finished runs are kept in {args.work}; run the same command to continue"
    return run(lambda: _run(args, arguments), state=state)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Without pretrain's warnings: checkpoints are damaged here on purpose."""
    log = logging.getLogger("pretrain")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def _run(args: argparse.Namespace, arguments: list[str] | None) -> int:
    if args.faults < 1:
        raise ValueError(f"--faults={args.faults} is below 1; use 1 or more")
    work = args.work.resolve()  # strike.cpp knows a run's paths by their beginning
    with _errors_only(), Lock(work):
        runs = read_finished(work / FINISHED, args.seed)
        runs = _go_on(work, runs, args.faults, args.seed)
    results = (
        about("benchmarks.faults", arguments) | machine("torch", "deepspeed") | {"seed": args.seed, **sum_up(runs)}
    )
    print("\n".join(table(results)))
    write(results, args.out, show=False)
    return 0 if results["runs_good"] == results["runs"] and not results["tracebacks"] and not results["wrong"] else 1


def read_finished(path: Path, seed: int) -> list[dict[str, Any]]:
    """The runs that an earlier call finished. Raises ValueError for those of another seed."""
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    runs = [json.loads(line) for line in lines]
    if any(each["seed"] != seed for each in runs):
        raise ValueError(f"{path} holds runs of --seed {runs[0]['seed']}; take that seed, or another --work")
    write_file(path, b"".join(lines))  # without a line that a kill cut short
    return runs


def _go_on(work: Path, runs: list[dict[str, Any]], faults: int, seed: int) -> list[dict[str, Any]]:
    done = sum(count_struck(each) for each in runs)
    if done >= faults:
        return runs
    data = prepare(work)
    preload(build(work))
    start_server()
    alone = cache(partial(left_alone, data, work))
    finished = Lines(work / FINISHED)
    with tqdm(total=faults, initial=done, unit="fault", disable=None) as bar, closing(finished):
        while done < faults:
            schedule = Schedule(seed, len(runs), alone)
            report = FaultyRun(data, work, len(runs), schedule).finish(alone(schedule.layouts[0]).stage)
            runs.append({"seed": seed, **report})
            finished.write(json.dumps(runs[-1]).encode() + b"\n")
            done += count_struck(report)
            bar.update(count_struck(report))
    return runs


def count_struck(report: dict[str, Any]) -> int:
    return sum(fault["struck"] for fault in report["faults"])


def sum_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all runs, by kind of fault and by layout."""
    faults = [fault | {"good": each["good"]} for each in runs for fault in each["faults"]]
    kinds = {
        kind: {
            "tried": sum(fault["kind"] == kind for fault in faults),
            "struck": sum(fault["kind"] == kind and fault["struck"] for fault in faults),
            "runs": len(met := [each for each in runs if _has_met(each, kind)]),
            "runs_good": sum(each["good"] for each in met),
        }
        for kind in KINDS
    }
    layouts = {name: _sum_of_layout([each for each in runs if each["layout"] == name]) for name in KINDS_OF_RUN}
    whole = _sum_of_layout(runs)
    struck = [fault for fault in faults if fault["struck"]]
    return {
        "faults_tried": len(faults),
        "faults_struck": len(struck),
        **whole,
        "runs_bit_equal": sum(not each["unequal"] for each in runs if each["layout"] != CHANGING),
        "runs_equal_to_rounding": sum(each["good"] for each in runs if each["layout"] == CHANGING),
        "rounding": ROUNDING,
        "wrong": [f"run {each['run']}: {what}" for each in runs for what in each["wrong"]],
        "kinds": kinds,
        "layouts": layouts,
        "struck_by": dict(Counter(_by(fault) for fault in struck).most_common()),
    }


def _has_met(report: dict[str, Any], kind: str) -> bool:
    return any(fault["kind"] == kind and fault["struck"] for fault in report["faults"])


def _sum_of_layout(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "runs": len(runs),
        "runs_good": sum(each["good"] for each in runs),
        "lives": sum(each["lives"] for each in runs),
        "samples_lost": sum(each["lost"] for each in runs),
        "samples_repeated": sum(each["repeated"] for each in runs),
        "apart": max((each["apart"] for each in runs), default=0.0),
        "tracebacks": sum(each["tracebacks"] for each in runs),
        "seconds": round(sum(each["seconds"] for each in runs)),
    }


def _by(fault: dict[str, Any]) -> str:
    """A fault's kind and what it did, without where it struck."""
    if fault["kind"] == "layout":
        return f"layout: {fault['what']}"
    words = fault["what"].split()
    if fault["kind"] == "damage":
        return f"damage: {words[0]}"
    stays = " and from then on" if fault["what"].endswith("from then on") else ""
    return f"{fault['kind']}: {words[0]} {words[1]}{stays}"


def table(results: dict[str, Any]) -> list[str]:
    """Rows by kind of fault, then by layout."""
    rows = [f"{'fault':<10}{'tried':>8}{'struck':>8}{'runs':>8}{'good':>8}"]
    for kind, each in results["kinds"].items():
        rows.append(f"{kind:<10}{each['tried']:>8}{each['struck']:>8}{each['runs']:>8}{each['runs_good']:>8}")
    rows.append(
        f"{'all':<10}{results['faults_tried']:>8}{results['faults_struck']:>8}{results['runs']:>8}{results['runs_good']:>8}"
    )
    rows += ["", f"{'run':<20}{'runs':>6}{'lives':>7}{'good':>6}{'lost':>6}{'repeated':>10}{'apart':>9}{'seconds':>9}"]
    for name, each in [*results["layouts"].items(), ("all", results)]:
        figures = f"{each['runs']:>6}{each['lives']:>7}{each['runs_good']:>6}{each['samples_lost']:>6}"
        rows.append(f"{name:<20}{figures}{each['samples_repeated']:>10}{each['apart']:>9.1e}{each['seconds']:>9}")
    rows.append(f"good: equal to the bit; of {CHANGING}: the same samples, losses and weights to {ROUNDING:g}")
    rows += [f"wrong: {what}" for what in results["wrong"]]
    return rows


if __name__ == "__main__":
    sys.exit(main())
