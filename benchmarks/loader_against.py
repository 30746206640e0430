"""This loader against the usual one, webdataset and Pillow with the same augmentations: same shards, same process, in
turns, on one core; medians of the rounds, and the least.

CPU seconds are counted, because other work on a shared machine takes wall time from whoever runs beside it. It also
takes cache, and its part of a core that two hardware threads share; so the least of many short rounds is nearest to an
idle machine. Both give batches of uint8 pictures [N, 3, size, size]; ours masks them too. Ours runs twice more: once it
leaves flip and jitter to the device (loading.jitter_on_device), whose time is not in its figure, and once it also
decodes at half size where that leaves three quarters of a crop's side (transform.cover). `imagenet` are JPEGs of 500 x
375 pixels and about 100 kB, as ImageNet's are on average.

    python -m benchmarks.loader_against --out benchmarks/results/loader_against.json
"""

from __future__ import annotations

import argparse
import io
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance

from benchmarks.record import machine
from benchmarks.synthetic import PICTURES, write_synthetic
from pretrain.command import about, make_parser, run, write
from pretrain.data.decoding import decode_image
from pretrain.data.loader import Loader
from pretrain.data.masking import Masking
from pretrain.data.mixture import Loading, Mixture, View
from pretrain.data.shards.reader import ShardReader, load_manifest
from pretrain.data.sources import ImageShards, picture
from pretrain.data.transforms import ImageTransform

PREFETCH = 2
BATCHES = 8  # by each worker
SIZES = (224, 384, 768)  # of the crop
COVER = 0.75
GOALS = {"256": 2.5, "512": 3.0}


class Usual:
    """Torchvision's RandomResizedCrop (bicubic, as BEiT), RandomHorizontalFlip and ColorJitter, on Pillow pictures."""

    def __init__(self, like: ImageTransform):
        self.like, self.rng = like, random.Random(0)

    def __call__(self, image: Image.Image) -> np.ndarray:
        rng, like = self.rng, self.like
        image = image.crop(self._box(*image.size)).resize((like.size, like.size), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tools = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
        rng.shuffle(tools)
        for tool in tools:
            image = tool(image).enhance(rng.uniform(1 - like.jitter, 1 + like.jitter))
        return np.asarray(image).transpose(2, 0, 1)

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * self.rng.uniform(*self.like.scale)
            ratio = math.exp(self.rng.uniform(*map(math.log, self.like.ratio)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = self.rng.randint(0, width - w), self.rng.randint(0, height - h)
                return left, top, left + w, top + h
        return 0, 0, width, height


def usual(directory: Path, transform: ImageTransform, batch: int, workers: int) -> Iterator[Any]:
    import webdataset

    urls = [str(path) for path in sorted(directory.glob("*.tar"))]
    data = webdataset.WebDataset(urls * max(workers, 1), shardshuffle=False)
    data = data.decode("pil").to_tuple("jpg").map_tuple(Usual(transform)).repeat().batched(batch, collation_fn=_stack)
    return iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=workers))


def _stack(samples: list[tuple[np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample[0] for sample in samples]))


def ours(
    directory: Path, transform: ImageTransform, batch: int, workers: int, *, on_device: bool = False
) -> Iterator[Any]:
    loading = Loading(workers=workers, prefetch=PREFETCH, jitter_on_device=on_device)
    mixture = Mixture({"images": ImageShards(str(directory))}, {"images": batch}, loading=loading)
    return Loader(mixture, View(None, transform, Masking(), 16)).batches(0, sys.maxsize // 2)


def decoding(directory: Path, batch: int, decode: Callable[[bytes], object]) -> Iterator[Any]:
    """Decodes `batch` pictures at a time, and does nothing else."""
    manifest = load_manifest(str(directory))
    reader = ShardReader(manifest)
    data = [picture(reader.read(0, number)) for number in range(manifest.shards[0].samples)]
    place = 0
    while True:
        for number in range(batch):
            decode(data[(place + number) % len(data)])
        place += batch
        yield None


def compare(directory: Path, transform: ImageTransform, args: argparse.Namespace) -> dict[str, Any]:
    """CPU microseconds a picture of each, medians of the rounds, and the ratios within each round."""
    entrants = {
        "webdataset_pillow": usual(directory, transform, args.batch, 0),
        "loader": ours(directory, transform, args.batch, 0),
        "loader_jitter_on_device": ours(directory, transform, args.batch, 0, on_device=True),
        "loader_both": ours(directory, replace(transform, cover=COVER), args.batch, 0, on_device=True),
        "decoding_alone": decoding(directory, args.batch, decode_image),
        "pillow_decoding_alone": decoding(directory, args.batch, lambda data: Image.open(io.BytesIO(data)).load()),
    }
    spent: dict[str, list[float]] = {name: [] for name in entrants}
    for turn in range(args.rounds + 1):
        for name, batches in entrants.items():
            start = time.process_time()
            for _ in range(args.batches):
                next(batches)
            if turn:  # the first one fills caches
                spent[name].append((time.process_time() - start) / (args.batches * args.batch) * 1e6)
    least = {name: min(times) for name, times in spent.items()}
    ratios = {}
    for name in (name for name in entrants if name.startswith("loader")):
        end = name.removeprefix("loader")
        for other, what in (("webdataset_pillow", "times_as_fast"), ("decoding_alone", "of_decoding_alone")):
            each = [a / b for a, b in zip(spent[other], spent[name], strict=True)]
            ratios[f"{what}{end}"] = round(statistics.median(each), 2)
            ratios[f"{what}{end}_by_the_least"] = round(least[other] / least[name], 2)
    return {
        "cpu_us_per_picture": {name: round(statistics.median(times)) for name, times in spent.items()},
        "pictures_per_cpu_second": {name: round(1e6 / statistics.median(times)) for name, times in spent.items()},
        "least_cpu_us_per_picture": {name: round(time) for name, time in least.items()},
    } | ratios


def growth(directory: Path, args: argparse.Namespace) -> dict[int, int]:
    """The least CPU microseconds a picture by the side of the crop, in turns."""
    entrants = {size: ours(directory, ImageTransform(size=size), args.batch, 0) for size in SIZES}
    spent: dict[int, list[float]] = {size: [] for size in SIZES}
    for _ in range(-(-args.rounds // 6)):
        for size, batches in entrants.items():
            start = time.process_time()
            next(batches)
            spent[size].append((time.process_time() - start) / args.batch * 1e6)
    return {size: round(min(times)) for size, times in spent.items()}


def scaling(directory: Path, transform: ImageTransform, args: argparse.Namespace) -> dict[str, Any]:
    """With 1 and 2 workers in turns: wall rates, and CPU microseconds a picture of the workers and this process."""
    rates: dict[int, list[tuple[float, float, float]]] = {1: [], 2: []}
    for _ in range(-(-args.rounds // 12)):
        for workers, measured in rates.items():
            measured.append(_rate(ours(directory, transform, args.batch, workers), args, workers))
    middle = {n: [statistics.median(column) for column in zip(*each, strict=True)] for n, each in rates.items()}
    return {
        "pictures_per_second": {n: round(each[0]) for n, each in middle.items()},
        "cpu_us_per_picture_workers": {n: round(each[1]) for n, each in middle.items()},
        "cpu_us_per_picture_this_process": {n: round(each[2], 1) for n, each in middle.items()},
        "two_workers_times_one": round(statistics.median(b[0] / a[0] for a, b in zip(*rates.values(), strict=True)), 2),
        "by_cpu_time": round(2 * middle[1][1] / (middle[2][1] + middle[2][2]), 2),
    }


def _rate(batches: Iterator[Any], args: argparse.Namespace, workers: int) -> tuple[float, float, float]:
    import multiprocessing

    for _ in range(workers * PREFETCH):  # what they make while nobody measures
        next(batches)
    clocks = [_clock(child.pid) for child in multiprocessing.active_children() if child.pid]
    before, own, start = [time.clock_gettime(clock) for clock in clocks], time.process_time(), time.perf_counter()
    count = BATCHES * args.batch * workers
    for _ in range(BATCHES * workers):
        next(batches)
    seconds, own = time.perf_counter() - start, time.process_time() - own
    theirs = sum(time.clock_gettime(clock) for clock in clocks) - sum(before)
    batches.close()  # type: ignore[attr-defined]
    return count / seconds, theirs / count * 1e6, own / count * 1e6


def _clock(pid: int) -> int:
    """Linux's number of the clock of a process's CPU time (clock_getcpuclockid)."""
    return (~pid << 3) | 2


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.loader_against", __doc__, "--pictures 256 --rounds 5")
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--batch", type=int, default=32, help="pictures of a batch (%(default)s)")
    parser.add_argument("--batches", type=int, default=1, help="of each entrant in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=60, help="%(default)s")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crop (%(default)s)")
    parser.add_argument("--samples", type=int, default=256, help="JPEGs of each kind (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    torch.set_num_threads(1)
    cores, results = os.sched_getaffinity(0), {}
    transform = ImageTransform(size=args.size)
    for name in args.pictures:
        width, height, quality, grain = PICTURES[name]
        with tempfile.TemporaryDirectory() as directory:
            write_synthetic(Path(directory), args.samples, width, height, quality, grain)
            size = sum(path.stat().st_size for path in Path(directory).glob("*.tar")) / args.samples
            os.sched_setaffinity(0, {min(cores)})
            result = compare(Path(directory), transform, args)
            sizes = growth(Path(directory), args)
            os.sched_setaffinity(0, cores)
            results[name] = {"kb_per_picture": round(size / 1000), "goal": GOALS.get(name)} | result
            results[name]["least_cpu_us_per_picture_by_size"] = sizes
            results[name]["workers"] = scaling(Path(directory), transform, args)
    facts = about("benchmarks.loader_against", arguments) | machine("pillow", "webdataset", "opencv-python-headless")
    facts |= {"size": args.size, "batch": args.batch, "rounds": args.rounds, "cover": COVER}
    write(facts | results, args.out)


if __name__ == "__main__":
    sys.exit(main())
