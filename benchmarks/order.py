"""The cost of the plan of the data order: build time, memory, seek time. Reads no data.

python -m benchmarks.order --samples 5e9 --shards 50000 --out benchmarks/results/order.json
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.record import machine, peak_bytes
from pretrain.command import about, run, write
from pretrain.data.order import Order


def measure(samples: int, shards: int, streams: int, block_shards: int, batch: int, seeks: int) -> dict[str, float]:
    """Seconds and MiB of one plan over shards of unequal size, and of `seeks` seeks to random steps."""
    # Unequal, like downloads: 0.8 to 1.2 times the mean.
    weights = np.linspace(0.8, 1.2, shards)
    counts = np.diff(np.round(np.concatenate([[0], np.cumsum(weights)]) * (samples / weights.sum())).astype(np.int64))
    before = peak_bytes()
    start = time.perf_counter()
    order = Order(counts, seed=0, streams=streams, block_shards=block_shards)
    order.batch(1, batch)
    build = time.perf_counter() - start
    steps = max(order.samples // batch, 1)
    rng = random.Random(0)
    within = [_seek(order, rng.randint(1, steps), batch) for _ in range(seeks)]
    across = [_seek(order, rng.randint(1, 100 * steps), batch) for _ in range(min(seeks, 20))]
    return {
        "build_s": round(build, 4),
        "memory_mib": round((peak_bytes() - before) / 2**20, 1),
        "seek_mean_s": round(sum(within) / len(within), 5),
        "seek_max_s": round(max(within), 5),
        "seek_to_another_epoch_max_s": round(max(across), 5),
    }


def _seek(order: Order, step: int, batch: int) -> float:
    start = time.perf_counter()
    order.batch(step, batch)
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.order",
        description="Times the plan of the data order for a source of a given size. Reads no data.",
        epilog="example: python -m benchmarks.order --samples 5e9 --shards 50000 --streams 4096",
    )
    parser.add_argument("--samples", type=float, default=5e9, help="of the source (%(default)g)")
    parser.add_argument("--shards", type=int, default=50_000, help="of the source (%(default)s)")
    parser.add_argument("--streams", type=int, default=64, help="loading.streams (%(default)s)")
    parser.add_argument("--block-shards", type=int, default=8, help="loading.block_shards (%(default)s)")
    parser.add_argument("--batch", type=int, default=6144, help="samples per step (%(default)s)")
    parser.add_argument("--seeks", type=int, default=100, help="to random steps (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    for name in ("samples", "shards", "batch", "seeks"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is below 1; use 1 or more")
    setting = {name: int(value) for name, value in vars(args).items() if name != "out"}
    facts = about("benchmarks.order", arguments) | machine("numpy")
    write({**setting, **measure(**setting), **facts}, args.out)


if __name__ == "__main__":
    sys.exit(main())
