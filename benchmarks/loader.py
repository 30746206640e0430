"""The loader's samples per second with so many workers, and where its time goes; see benchmarks.loader_parts.

python -m benchmarks.loader --workers 0 1 2
python -m benchmarks.loader --shards data/cc12m --kind pairs --tokenizer data/text.model --out cc12m.json
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.loader_parts import parts
from benchmarks.synthetic import write_synthetic
from pretrain.command import about, make_parser, run, write
from pretrain.data.loader import Loader
from pretrain.data.masking import Masking
from pretrain.data.mixture import Loading, Mixture, View
from pretrain.data.sources import ImageShards, PairShards
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.data.transforms import ImageTransform


def loader_rate(args: argparse.Namespace, shards: str, transform: ImageTransform, workers: int) -> float:
    """Samples per second that arrive in the main process, which does nothing else."""
    source = ImageShards(shards) if args.kind == "images" else PairShards(shards)
    loader = Loader(
        Mixture({args.kind: source}, {args.kind: args.batch}, loading=Loading(workers=workers)),
        View(TextTokenizer(args.tokenizer) if args.tokenizer else None, transform, Masking(), args.patch_size),
    )
    batches = loader.batches(0, sys.maxsize // 2)
    for _ in range(2 * max(workers, 1) * Loading.prefetch):  # not counting prefetched batches
        next(batches)
    steps, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < args.seconds:
        next(batches)
        steps += 1
    batches.close()
    return steps * args.batch / spent


def measure(args: argparse.Namespace, shards: str) -> dict:
    transform = ImageTransform(size=args.size)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "shards": args.shards or f"synthetic, {args.side} px",
        "kind": args.kind,
        "size": args.size,
        "batch": args.batch,
        "us_per_picture": parts(shards, transform, args.patch_size, args.seconds),
        "loader_per_second": {str(n): round(loader_rate(args, shards, transform, n)) for n in args.workers},
    }


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser("benchmarks.loader", __doc__, "--workers 0 1 --samples 64 --seconds 1")
    parser.add_argument("--shards", help="an indexed directory or pattern (default: synthetic JPEGs)")
    parser.add_argument("--kind", choices=("images", "pairs"), default="images", help="pairs need --tokenizer")
    parser.add_argument("--tokenizer", help="a SentencePiece file")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of workers to measure")
    parser.add_argument("--batch", type=int, default=64, help="samples per step")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crop")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=256, help="pixels of a synthetic JPEG")
    parser.add_argument("--samples", type=int, default=512, help="how many synthetic JPEGs")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        if args.shards is None:
            write_synthetic(Path(directory), args.samples, args.side, args.side)
        result = measure(args, args.shards or directory)
    write({**about("benchmarks.loader", arguments), **result}, args.out)


if __name__ == "__main__":
    sys.exit(main())
