"""Faults on a real SLURM of three nodes on this machine: what each costs, and what the run ends with.

    python -m benchmarks.slurm_faults scenarios --out benchmarks/results/slurm_faults.json
    python -m benchmarks.slurm_faults soak --faults 100 --out benchmarks/results/slurm_soak.json

A run of 2 nodes with 2 ranks each goes through launch/submit.sh. `scenarios`: each kind of fault strikes one run of its
own. `soak`: faults of a seeded schedule strike one run, one after the other, each when the run has come further than
ever before. Weights, the optimizer's state, metrics.jsonl (without what a clock measured) and the samples of each rank
must equal those of a run that was left alone, to the bit. The seconds are from the strike to the next step that was
done; on few cores most of them are imports of Python. Each run's directory is a file system of its own, in memory,
which a fault can fill. For root on Debian with SLURM (tests/run.sh installs it), from the repository's root.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.fault_runs.compare import check_epochs, compare
from benchmarks.record import machine
from benchmarks.slurm_runs.job import MORE, STAGE, Job, Measured, sum_by_kind
from benchmarks.slurm_runs.predict import predict
from benchmarks.slurm_runs.strike import STRIKES
from pretrain.command import about, make_parser, run, write
from pretrain.json_files import read_object
from pretrain.lives import read_lives
from pretrain.report.rows import load_run
from tests.slurm.one_host import slurm, why_not
from tests.small_run import train_stage, write_data

RANKS, DISK_MIB = 2, 256
SAVE_EVERY, STEPS, MEAN_STEPS = 5, 120, 7
LONG_STEPS = 900  # more than a minute, by which SLURM counts time limits
SETTINGS = ["drop_path=0.1", f"save_every={SAVE_EVERY}"]
# How often each kind strikes in a soak. What SLURM is asked for is rarer than what breaks, as on a cluster; the time
# limit's warning comes by SLURM's own minute, and is among the scenarios only.
WEIGHTS = {
    **{"rank killed": 70, "rank stopped": 10, "USR1": 5, "requeue": 4, "node down": 3, "node killed": 2},
    **{"preemption": 2, "store stalled": 2, "disk full": 2},
}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.slurm_faults", __doc__, "scenarios --kinds 'rank killed' --work runs/slurm")
    parser.add_argument("what", choices=["scenarios", "soak"])
    parser.add_argument("--kinds", nargs="+", choices=STRIKES, default=list(STRIKES), help="of the scenarios (all)")
    parser.add_argument("--ds", nargs="+", default=["zero1.json"], metavar="JSON", help="of ds_configs/ (%(default)s)")
    parser.add_argument("--faults", type=int, default=100, metavar="N", help="of the soak (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the soak's schedule (%(default)s)")
    parser.add_argument("--minutes", type=float, default=600, help="after which a soak strikes no more (%(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/slurm_faults"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _end)
    return run(lambda: _run(args, arguments), state=f"what the runs left is in {args.work}")


def _end(number: int, frame: object) -> None:
    """Ends by an exception, on whose way out the daemons are stopped and the file systems unmounted. No second signal
    interrupts that."""
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _run(args: argparse.Namespace, arguments: list[str] | None) -> int:
    if reason := why_not():
        raise ValueError(reason)
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    (work / "slurm").mkdir(parents=True)
    data = write_data(work / "data")
    done = train_stage(data, data / "start", "tokenizer", CUDA_VISIBLE_DEVICES="")
    if done.returncode:
        raise ValueError(f"the tokenizer of the runs could not be trained: {done.stderr[-500:]}")
    command = about("benchmarks.slurm_faults", arguments)
    results = command | machine("torch", "deepspeed")
    with slurm(work / "slurm", nodes=3, gpus=2 * RANKS, lost_s=10, more=MORE) as more:
        if args.what == "scenarios":
            results |= scenarios(args, data, work, more, command)
        else:
            results |= soak(args, data, work, more)
    write(results, args.out)
    return 0 if results["good"] else 1


def scenarios(
    args: argparse.Namespace, data: Path, work: Path, more: Mapping[str, str], command: dict[str, str]
) -> dict[str, Any]:
    """Runs of other kinds or under other JSONs that are in `args.out` already stay there; each notes its `command`."""
    runs = kept_runs(args.out, {(ds, kind) for ds in args.ds for kind in args.kinds})
    alone = cache(partial(left_alone, data, work, more))
    for ds in args.ds:
        for kind in args.kinds:
            settings = (*SETTINGS, f"steps={LONG_STEPS if kind == 'time limit' else STEPS}")
            whole = alone(ds, settings)
            with file_system(work / f"{ds}_{kind.replace(' ', '_')}") as place:
                # Any number of workers gives the same bits, and only data that workers read can stall.
                own = [*settings, f"loading.workers={int(kind == 'store stalled')}"]
                job = Job(data, place, work / "slurm", more, 2, RANKS, ds, *own)
                runs.append({"ds": ds, **_scenario(kind, job, whole), **command})
                print(runs[-1], file=sys.stderr, flush=True)
            if args.out is not None:
                write(sum_up(runs), args.out, show=False)
    return sum_up(runs)


def sum_up(runs: list[dict[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {"good": all(each["good"] for each in runs)}
    return result | costs([(each["by"], each["seconds"]) for each in runs]) | {"runs": runs}


def costs(faults: list[tuple[str, float]]) -> dict[str, Any]:
    """From each fault's (mended by what, seconds): their number, mean, and what that predicts of a larger run."""
    by = {name: [seconds for how, seconds in faults if how == name] for name in ("in place", "requeue", "neither")}
    means = {name: round(statistics.fmean(own), 1) for name, own in by.items() if own}
    result: dict[str, Any] = {"by": {name: {"faults": len(by[name]), "mean_s": mean} for name, mean in means.items()}}
    if {"in place", "requeue"} <= means.keys():
        result["predicted_effective_training_time"] = predict(means["in place"], means["requeue"])
    return result


def kept_runs(out: Path | None, measured_now: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """The runs in the JSON `out`, without those that are measured again now."""
    if out is None or not out.exists():
        return []
    return [each for each in read_object(out)["runs"] if (each["ds"], each["kind"]) not in measured_now]


def _scenario(kind: str, job: Job, alone: Path) -> dict[str, Any]:
    if not job.wait_step(2 * SAVE_EVERY + 3):
        raise ValueError(f"{kind}: the run did not come to its first steps: {job.said()[-2000:]}")
    fault = job.strike(kind, 1)
    return {**fault._asdict(), **ending(job, alone)}


def soak(args: argparse.Namespace, data: Path, work: Path, more: Mapping[str, str]) -> dict[str, Any]:
    dice, ds = random.Random(args.seed), args.ds[0]
    faults: list[Measured] = []
    settings = (*SETTINGS, f"steps={args.faults * (MEAN_STEPS + SAVE_EVERY)}", "loading.workers=1")
    alone = left_alone(data, work, more, ds, settings)
    end, began = time.monotonic() + 60 * args.minutes, time.monotonic()
    with file_system(work / "soak") as place:
        job, reached = Job(data, place, work / "slurm", more, 2, RANKS, ds, *settings), 0
        while len(faults) < args.faults and time.monotonic() < end:
            kind = dice.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            victim, later = dice.randrange(2 * RANKS), dice.randint(1, 2 * MEAN_STEPS)
            if not job.wait_step(reached + later) or job.over:
                break
            try:
                faults.append(job.strike(kind, victim))
            except ValueError as error:
                print(error, job.said()[-2000:], sep="\n", file=sys.stderr)
                break
            reached = max(reached, faults[-1].step)
            print(len(faults), faults[-1], file=sys.stderr, flush=True)
        result = {"faults": len(faults), "seed": args.seed, "ds": ds, **ending(job, alone)}
        result["minutes"] = round((time.monotonic() - began) / 60, 1)
    result["good"] = result["good"] and len(faults) == args.faults
    result |= costs([(fault.by, fault.seconds) for fault in faults]) | {"kinds": sum_by_kind(faults)}
    return result | {"each": [list(fault) for fault in faults]}


def left_alone(data: Path, work: Path, more: Mapping[str, str], ds: str, settings: tuple[str, ...]) -> Path:
    """The stage of a run that nothing struck, with all of its ranks on one node."""
    place = work / f"alone_{ds.removesuffix('.json')}_{len(list(work.glob('alone_*')))}"
    job = Job(data, place, work / "slurm", more, 1, 2 * RANKS, ds, *settings)
    if (state := job.finish()) != "COMPLETED":
        raise ValueError(f"the run that was left alone ended as {state}: {job.said()[-2000:]}")
    check_epochs(job.stage)
    return job.stage


def ending(job: Job, alone: Path) -> dict[str, Any]:
    """How the run ended, against the one that was left alone."""
    state = job.finish()
    lives = read_lives(job.stage)
    result: dict[str, Any] = {"state": state, "lives": len(lives)}
    if state == "COMPLETED":
        result |= compare(job.stage, alone)._asdict()
        (stage,) = [each for each in load_run(job.stage.parent) if each.name == STAGE]
        result["effective_training_time"] = stage.effective()
    else:
        result["said"] = job.said()[-2000:]
    return result | {"good": state == "COMPLETED" and not result["unequal"]}


@contextmanager
def file_system(place: Path) -> Iterator[Path]:
    """A file system of DISK_MIB, in memory, mounted at `place`."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


if __name__ == "__main__":
    sys.exit(main())
