"""What threads that wait cost: a stage's speed with torch's own threads, with threads that sleep, and with one thread.

    python -m benchmarks.idle_threads --out benchmarks/results/idle_threads.json

OpenMP's threads spin for a while when a product ends (OMP_WAIT_POLICY unset), which takes the cores from whatever else
runs there. launch/quickstart.sh and launch/local.sh set PASSIVE for this reason. Each case is a process of its own, in
turns over the rounds: alone, and beside one process that never waits. Medians of samples/s, as benchmarks.throughput.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.record import machine
from pretrain.command import about, make_parser, run, write
from pretrain.json_files import read_object

ROOT = Path(__file__).parents[1]
WAYS = {"spin": {}, "sleep": {"OMP_WAIT_POLICY": "PASSIVE"}, "one thread": {"OMP_NUM_THREADS": "1"}}
OURS = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


@contextmanager
def busy_process() -> Iterator[None]:
    """A process that takes all it can get of one core."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()


def samples_per_s(way: str, args: argparse.Namespace) -> float:
    """The speed of the stage in a process of its own. ValueError where it fails."""
    env = {name: value for name, value in os.environ.items() if name not in OURS} | WAYS[way]
    with tempfile.TemporaryDirectory() as place:
        line = ["-m", "benchmarks.throughput", "--recipe", args.recipe, "--stage", args.stage, "--ds", args.ds]
        line += ["--steps", str(args.steps), "--warmup", "3", "--out", f"{place}/out.json"]
        line += [word for setting in args.set for word in ("--set", setting)]
        done = subprocess.run([sys.executable, *line], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"python {' '.join(line)} ended with {done.returncode}: {done.stderr[-500:]}")
        return float(read_object(Path(place) / "out.json")["samples_per_s"])


def measure(args: argparse.Namespace, arguments: list[str] | None) -> None:
    if args.rounds < 1 or args.steps < 1:
        raise ValueError(f"--rounds {args.rounds} and --steps {args.steps} must be 1 or more")
    speeds: dict[str, dict[str, list[float]]] = {"alone": {}, "beside a busy process": {}}
    for _ in range(args.rounds):
        for way in WAYS:
            speeds["alone"].setdefault(way, []).append(samples_per_s(way, args))
            with busy_process():
                speeds["beside a busy process"].setdefault(way, []).append(samples_per_s(way, args))
    results: dict[str, Any] = {
        place: {way: round(statistics.median(values), 1) for way, values in own.items()}
        for place, own in speeds.items()
    }
    write(about("benchmarks.idle_threads", arguments) | machine("torch") | {"samples_per_s": results}, args.out)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.idle_threads", __doc__, "--rounds 1 --steps 20")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--stage", default="vision", help="(%(default)s)")
    parser.add_argument("--ds", default="ds_configs/zero0.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=40, help="timed in each process (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: measure(args, arguments), state="nothing was written; run the same command again")


if __name__ == "__main__":
    sys.exit(main())
