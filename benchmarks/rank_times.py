"""What it costs to find the rank that makes the others wait (pretrain/run/stragglers.py), for each step and each rank.

    torchrun --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0 -m benchmarks.rank_times

The hooks of the encoder and the bookkeeping of a step are timed around an encoder that does nothing, with them and
without in turns; so are the products that take its place under ZeRO-3, and the comparison of all ranks, which comes
every 50 steps, where all of them are ready for it. Medians over the rounds, on rank 0.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.record import machine
from pretrain.command import about, make_parser, run, write
from pretrain.distributed import barrier, rank, world_size
from pretrain.parallel.engine import init_distributed
from pretrain.run.stragglers import EVERY, RankTimes

STEPS, COMPARISONS = 2000, 5


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.rank_times", __doc__, "--rounds 7")
    parser.add_argument("--rounds", type=int, default=7, help="whose median counts (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    args = parser.parse_args(arguments)
    return run(lambda: _measure(args, arguments), state="nothing was changed")


def _measure(args: argparse.Namespace, arguments: list[str] | None) -> None:
    init_distributed()
    plain, timed = nn.Identity(), nn.Module()
    timed.encoder = nn.Identity()
    with tempfile.TemporaryDirectory() as place:
        times = RankTimes(timed, Path(place), apart=True)
        products = RankTimes(nn.Module(), Path(place), apart=False)
        rounds = [_round(plain, timed.encoder, times, products) for _ in range(args.rounds)]
    without, with_them, compared, multiplied = (statistics.median(column) for column in zip(*rounds, strict=True))
    each = with_them - without + compared / EVERY
    results: dict[str, Any] = {
        "ranks": world_size(),
        "step_us": round(1e6 * (with_them - without), 2),
        "comparison_us": round(1e6 * compared, 1),
        "together_us_per_step": round(1e6 * each, 2),
        "percent_of_a_step_of_100_ms": round(1e2 * each / 0.1, 4),
        "products_us_per_step": round(1e6 * multiplied, 1),
        "percent_with_products": round(1e2 * (multiplied + compared / EVERY) / 0.1, 4),
        "machine": machine("torch"),
        **about("benchmarks.rank_times", arguments),
    }
    results["command"] = f"torchrun --nproc-per-node {world_size()} " + results["command"].removeprefix("python ")
    if rank() == 0:
        write(results, args.out)
    dist.destroy_process_group()


def _round(
    plain: nn.Module, encoder: nn.Module, times: RankTimes, products: RankTimes
) -> tuple[float, float, float, float]:
    """Seconds of a step without, of one with, of a comparison, and of a step where products are timed."""
    x = torch.ones(1)
    start = time.perf_counter()
    for _ in range(STEPS):
        plain(x)
    without = (time.perf_counter() - start) / STEPS
    start = time.perf_counter()
    for _ in range(STEPS):
        encoder(x)
        times.tick(0.0)
    with_them = (time.perf_counter() - start) / STEPS
    start = time.perf_counter()
    for _ in range(STEPS // 10):
        products.tick(0.0)
    multiplied = (time.perf_counter() - start) / (STEPS // 10)
    compared = []
    for _ in range(COMPARISONS):
        for _ in range(EVERY):
            encoder(x)
            times.tick(0.0)
        barrier()
        start = time.perf_counter()
        times.read()
        compared.append(time.perf_counter() - start)
    return without, with_them, statistics.median(compared), multiplied


if __name__ == "__main__":
    sys.exit(main())
