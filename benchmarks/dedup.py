"""The cost of finding near duplicates: time, memory and recall for N hashes, and pictures hashed per second.

    python -m benchmarks.dedup --hashes 1e4 1e5 1e6 --out benchmarks/results/dedup.json

Half of the hashes are random, like those of photos; a fifth are clustered around a few centres, within a few bits, like
logos and blank pages; a tenth share 40 bits; the rest are planted copies of others, up to --distance bits away. All are
shuffled. Each number of hashes runs in its own process, which gives it its own peak memory. For the smallest numbers
all pairs are also found by brute force.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.record import machine, peak_bytes
from data_tools.drawn.scenes import draw_scene, encode_jpeg, random_scene
from data_tools.pictures.hashes import look_at
from data_tools.pictures.near import keep_first, near_pairs
from pretrain.command import about, make_parser, run, write

_BRUTE = 20_000  # hashes at most for brute force, which takes seconds
_CLUSTERS = 20


def mixture(n: int, distance: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(uint64 [n], int64 [copies, 2]: place of an original and of its copy)."""
    rng = np.random.default_rng(seed)
    clustered, corner, copies = n // 5, n // 10, n // 5
    hashes = rng.integers(0, 2**64, n, dtype=np.uint64)
    hashes[:clustered] = _flip_bits(rng, rng.choice(rng.integers(0, 2**64, _CLUSTERS, dtype=np.uint64), clustered), 6)
    hashes[clustered : clustered + corner] &= np.uint64(0xFFFFFF)
    originals = rng.integers(clustered + corner, n - copies, copies)
    hashes[n - copies :] = _flip_bits(rng, hashes[originals], distance)
    place = rng.permutation(n)
    shuffled = np.empty_like(hashes)
    shuffled[place] = hashes
    return shuffled, np.stack([place[originals], place[n - copies :]], axis=1)


def _flip_bits(rng: np.random.Generator, hashes: np.ndarray, most: int) -> np.ndarray:
    """The hashes with up to `most` random bits flipped."""
    copies = hashes.copy()
    for turn in range(most):
        subset = rng.random(len(hashes)) < (most - turn) / (most + 1)
        copies[subset] ^= np.uint64(1) << rng.integers(0, 64, int(subset.sum())).astype(np.uint64)
    return copies


def measure(n: int, distance: int) -> dict[str, float]:
    """Seconds of CPU time and MiB of one pass over n hashes, and the outcome of the planted copies."""
    hashes, planted = mixture(n, distance)
    before = peak_bytes()
    wall, start = time.perf_counter(), time.process_time()
    neighbours = keep_first(hashes, distance)
    result = {
        "hashes": n,
        "seconds": round(time.perf_counter() - wall, 3),
        "cpu_seconds": round(time.process_time() - start, 3),
        "memory_mib": round((peak_bytes() - before) / 2**20, 1),
        "dropped": int((neighbours.item >= 0).sum()),
        # Of an original and its copy one is dropped, unless both are near to a third one that is dropped.
        "planted": len(planted),
        "planted_of_which_one_is_dropped": int((neighbours.item[planted] >= 0).any(axis=1).sum()),
    }
    if n <= _BRUTE:
        result |= _recall(hashes, distance)
    return result


def _recall(hashes: np.ndarray, distance: int) -> dict[str, float]:
    start = time.process_time()
    pairs = sum(int((np.bitwise_count(hashes[i] ^ hashes[i + 1 :]) <= distance).sum()) for i in range(len(hashes)))
    seconds = time.process_time() - start
    pairs_found = len(near_pairs(hashes, distance).first)
    return {"pairs": pairs, "pairs_found": pairs_found, "all_with_all_cpu_seconds": round(seconds, 3)}


def hashing(pictures: int, sizes: tuple[int, ...] = (256, 512)) -> dict[str, float]:
    """Pictures hashed per second by one process, from JPEG bytes in memory, for each picture size."""
    rates = {}
    for size in sizes:
        rng = random.Random(size)
        data = [encode_jpeg(draw_scene(random_scene(rng, held_out=False), size, rng)) for _ in range(pictures)]
        start = time.process_time()
        for jpeg in data:
            look_at(jpeg)
        rates[f"pictures_per_cpu_second_{size}px"] = round(pictures / (time.process_time() - start), 1)
    return rates


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.dedup", __doc__, "--hashes 1e4 1e5 --distance 4")
    parser.add_argument("--hashes", type=float, nargs="+", default=[1e4, 1e5, 1e6], help="how many hashes")
    parser.add_argument("--distance", type=int, default=4, help="bits that may differ (%(default)s)")
    parser.add_argument("--pictures", type=int, default=100, help="pictures to hash, of each size (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    if min(args.hashes) < 100:
        raise ValueError(f"--hashes={min(args.hashes):g} is too few to time; use 100 or more")
    rows = []
    print(f"{'hashes':>11} {'seconds':>9} {'MiB':>7} {'dropped':>9} {'planted':>9} {'one dropped':>11}  pairs found")
    for n in map(int, args.hashes):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (n, args.distance))
        rows.append(row)
        pairs = f"{row['pairs_found']:,} of {row['pairs']:,}" if "pairs" in row else ""
        print(
            f"{n:11,} {row['seconds']:9.2f} {row['memory_mib']:7.0f} {row['dropped']:9,} {row['planted']:9,} "
            f"{row['planted_of_which_one_is_dropped']:11,}  {pairs}"
        )
    rates = hashing(args.pictures) if args.pictures > 0 else {}
    for name, rate in rates.items():
        print(f"{name}: {rate:,}")
    facts = about("benchmarks.dedup", arguments) | machine("numpy")
    write({"distance": args.distance, "rows": rows, **rates, **facts}, args.out, show=False)


if __name__ == "__main__":
    sys.exit(main())
