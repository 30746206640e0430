"""What the start of a source costs before its first sample is read: the manifest, the plan of the order, a seek.

Seconds are CPU time, which other work on the machine hardly changes.

    python -m benchmarks.order --samples 5e9 --shards 50000
    python -m benchmarks.order --grow --out benchmarks/results/order.json    # 1e6 samples in 100 shards to 5e9 in 1e5
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import machine
from pretrain.command import about, make_parser, run, write
from pretrain.data.order import Order
from pretrain.data.shards.manifest import MANIFEST, Manifest, Shard, load_manifest

# (samples, shards) of the sources by which the cost grows.
GROWTH = ((1e6, 100), (1e7, 1000), (1e8, 10_000), (1e9, 100_000), (5e9, 50_000), (5e9, 100_000))


def measure(samples: int, shards: int, streams: int, block_shards: int, batch: int, seeks: int) -> dict[str, float]:
    """Seconds and MiB of one plan over shards of unequal size, and of `seeks` seeks to random steps."""
    # Unequal, like downloads: 0.8 to 1.2 times the mean.
    weights = np.linspace(0.8, 1.2, shards)
    counts = np.diff(np.round(np.concatenate([[0], np.cumsum(weights)]) * (samples / weights.sum())).astype(np.int64))
    manifest_s, manifest_bytes = _manifest(counts.tolist())
    start = time.process_time()
    order = Order(counts, seed=0, streams=streams, block_shards=block_shards)
    order.batch(1, batch)
    build = time.process_time() - start
    steps = max(order.samples // batch, 1)
    rng = random.Random(0)
    within = [_seek(order, rng.randint(1, steps), batch) for _ in range(seeks)]
    across = [_seek(order, rng.randint(1, 100 * steps), batch) for _ in range(min(seeks, 20))]
    return {
        "manifest_s": round(manifest_s, 3),
        "manifest_mib": round(manifest_bytes / 2**20, 1),
        "build_s": round(build, 4),
        "memory_mib": round(_memory(counts, streams, block_shards, batch) / 2**20, 1),
        "seek_mean_s": round(sum(within) / len(within), 5),
        "seek_max_s": round(max(within), 5),
        "seek_to_another_epoch_max_s": round(max(across), 5),
    }


def _manifest(counts: list[int]) -> tuple[float, int]:
    """(seconds to read a manifest of such shards, its size)."""
    with tempfile.TemporaryDirectory() as directory:
        shards = [Shard(f"{directory}/{n:06d}.tar", count, 10**9, "0" * 64, "0" * 64) for n, count in enumerate(counts)]
        size = Path(directory, MANIFEST).write_bytes(Manifest(tuple(shards)).to_json())
        start = time.process_time()
        load_manifest(directory)
        return time.process_time() - start, size


def _memory(counts: Any, streams: int, block_shards: int, batch: int) -> int:
    """The most bytes that the plan and one of its batches take."""
    tracemalloc.start()
    Order(counts, seed=0, streams=streams, block_shards=block_shards).batch(1, batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def _grow(args: argparse.Namespace) -> list[dict[str, float]]:
    """Each source in a process of its own."""
    cells = []
    for samples, shards in GROWTH:
        line = [sys.executable, "-m", "benchmarks.order", "--samples", str(samples), "--shards", str(shards)]
        line += ["--seeks", str(args.seeks), "--batch", str(args.batch), "--streams", str(args.streams)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"--grow: the source of {samples:g} samples failed: {done.stderr.strip()}")
        cells.append(json.loads(done.stdout))
    left_out = ("command", "date", "cpu_cores", "python", "numpy")
    return [{name: value for name, value in cell.items() if name not in left_out} for cell in cells]


def _seek(order: Order, step: int, batch: int) -> float:
    start = time.process_time()
    order.batch(step, batch)
    return time.process_time() - start


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.order", __doc__, "--samples 5e9 --shards 50000 --streams 4096")
    parser.add_argument("--samples", type=float, default=5e9, help="of the source (%(default)g)")
    parser.add_argument("--shards", type=int, default=50_000, help="of the source (%(default)s)")
    parser.add_argument("--streams", type=int, default=64, help="loading.streams (%(default)s)")
    parser.add_argument("--block-shards", type=int, default=8, help="loading.block_shards (%(default)s)")
    parser.add_argument("--batch", type=int, default=6144, help="samples per step (%(default)s)")
    parser.add_argument("--seeks", type=int, default=100, help="to random steps (%(default)s)")
    parser.add_argument("--grow", action="store_true", help="measure sources of several sizes instead")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    for name in ("samples", "shards", "batch", "seeks"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is below 1; use 1 or more")
    facts = about("benchmarks.order", arguments) | machine("numpy")
    if args.grow:
        write({"sources": _grow(args), **facts}, args.out)
        return
    setting = {name: int(value) for name, value in vars(args).items() if name not in ("out", "grow")}
    write({**setting, **measure(**setting), **facts}, args.out)


if __name__ == "__main__":
    sys.exit(main())
