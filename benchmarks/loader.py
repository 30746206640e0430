"""The loader's samples per second, and where its time goes: reading, decoding, transforming, masking.

python -m benchmarks.loader --workers 0 1 2
python -m benchmarks.loader --shards data/cc12m --kind pairs --tokenizer data/text.model --out cc12m.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.command import about, make_parser, run, write
from pretrain.data.decoding import decode_image
from pretrain.data.loader import Loader
from pretrain.data.masking import Masking, mask_image
from pretrain.data.mixture import Loading, Mixture, View
from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.reader import BadSample, ShardReader, load_manifest
from pretrain.data.sources import ImageShards, PairShards, picture
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.data.transforms import ImageTransform, sample_rng

# The parts are timed on this many pictures, repeatedly.
PICTURES = 256


def write_synthetic(
    directory: Path, samples: int, width: int, height: int, quality: int = 90, grain: float = 0.0
) -> None:
    """Writes a shard of JPEGs that compress like photographs: noise at all scales, fading upwards, and above them all
    `grain`, its deviation in levels."""
    rng = np.random.default_rng(0)
    with tarfile.open(directory / "00000.tar", "w") as tar:
        for number in range(samples):
            pixels = np.full((height, width, 3), 128.0)
            for scale in (4, 16, 64):
                noise = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
                layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
                pixels += (np.asarray(layer) - 128.0) * 2 / scale**0.5
            if grain:
                pixels += rng.normal(0, grain, (height, width, 1))
            data = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=quality)
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
    (directory / "00000_stats.json").write_text(json.dumps({"count": samples, "successes": samples}))
    index_directory(directory)


def rate(work: Callable[[int], object], count: int, seconds: float) -> float:
    """Calls per second of work(0), work(1), ..., work(count - 1), work(0), ..., measured for about `seconds`."""
    for i in range(min(count, 8)):
        work(i)
    done, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        work(done % count)
        done += 1
    return done / spent


def parts(shards: str, transform: ImageTransform, patch_size: int, seconds: float) -> dict[str, float]:
    """Samples per second of each part separately, in one process."""
    manifest = load_manifest(shards)
    reader = ShardReader(manifest)
    places = [(shard, i) for shard, entry in enumerate(manifest.shards) for i in range(entry.samples)][:PICTURES]
    pictures = []
    for place in places:
        try:
            data = picture(reader.read(*place))
            transform(data, sample_rng(0, 0, 0))
            pictures.append(data)
        except BadSample:
            continue
    if not pictures:
        raise ValueError(
            f"--shards={shards}: none of the first {len(places)} samples can be decoded; give other shards"
        )
    full = [decode_image(data) for data in pictures]

    def finish(i: int) -> np.ndarray:
        rng = sample_rng(0, 0, i)
        box = transform.crop(full[i].shape[0], full[i].shape[1], rng)
        return transform.finish(full[i][box.top : box.top + box.height, box.left : box.left + box.width], rng)

    grid, count = transform.size // patch_size, len(pictures)
    return {
        "bytes_per_picture": round(sum(map(len, pictures)) / count),
        "read": rate(lambda i: reader.read(*places[i]), len(places), seconds),
        "decode_full_size": rate(lambda i: decode_image(pictures[i]), count, seconds),
        "crop_resize_flip_jitter": rate(finish, count, seconds),
        "decode_and_transform": rate(lambda i: transform(pictures[i], sample_rng(0, 0, i)), count, seconds),
        "mask": rate(lambda i: mask_image(grid, 0.4, sample_rng(0, 0, i)), count, seconds),
    }


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
    parts_per_second = parts(shards, transform, args.patch_size, args.seconds)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "shards": args.shards or f"synthetic, {args.side} px",
        "kind": args.kind,
        "size": args.size,
        "batch": args.batch,
        "one_process_per_second": {name: round(value) for name, value in parts_per_second.items()},
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
