"""Where a picture's time goes in the loader: its parts in turns, in one thread of one process.

A figure is the mean, over the pictures, of the least CPU time that each of them took: that of a call which others
disturbed least, since on a shared machine they push out of the caches what takes longer to fetch than most parts take.
Parts run one kind after another and find their code in the caches; `whole`, which is what a worker does with a
picture's bytes, does not, so that it takes longer than their sum. What is done once a batch is divided by its pictures.
`blur` and `flip_and_jitter` are differences, and as uncertain as what they lie between.

python -m benchmarks.loader_parts --out benchmarks/results/loader_parts.json
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.record import machine
from benchmarks.synthetic import PICTURES, write_synthetic
from pretrain.batch import Layout, make_batch
from pretrain.command import about, make_parser, run, write
from pretrain.data.decoding import decode, judged_header
from pretrain.data.masking import mask_image, mask_text
from pretrain.data.parcel import Opened, Parcel
from pretrain.data.shards.reader import IMAGE_EXTENSIONS, BadSample, ShardReader, load_manifest
from pretrain.data.sources import caption_ids, picture
from pretrain.data.text_tokenizer import AnyTokenizer, open_tokenizer
from pretrain.data.transforms import ImageTransform, cut, sample_rng

MOST_PICTURES = 256
LEAST_ROUNDS = 3
IMAGE_RATIO, TEXT_RATIO, TEXT_LEN = 0.4, 0.5, 64
CAPTION = "a small brown dog runs after a red ball on the grass in front of an old house"


class Pictures(NamedTuple):
    """The same pictures after each part of their way."""

    places: list[tuple[int, int]]  # shard, sample
    data: list[bytes]
    decoded: list[np.ndarray]  # at the size that the crop allows
    crops: list[np.ndarray]


def parts(
    shards: str, transform: ImageTransform, patch_size: int, seconds: float, tokenizer: AnyTokenizer | None = None
) -> dict[str, float]:
    """Microseconds a picture of each part, measured for about `seconds` in all. ValueError for shards of which no
    picture can be decoded."""
    reader = ShardReader(load_manifest(shards))
    pictures = _pictures(shards, reader, transform)
    count = len(pictures.data)
    alone = _least(_single(reader, pictures, transform, transform.size // patch_size, tokenizer), count, seconds)
    together = _least(_batched(count, transform.size, patch_size), 1, seconds / 4)
    least = alone | {name: time / count for name, time in together.items()}
    least["blur"] = least.pop("resize_blurred") - least["resize"]
    least["flip_and_jitter"] = least.pop("resize_flip_jitter") - least["blur"] - least["resize"]
    return {name: round(time * 1e6, 1) for name, time in least.items()}


def _pictures(shards: str, reader: ShardReader, transform: ImageTransform) -> Pictures:
    manifest = reader.manifest
    places = [(shard, n) for shard, entry in enumerate(manifest.shards) for n in range(entry.samples)][:MOST_PICTURES]
    pictures = Pictures([], [], [], [])
    for number, place in enumerate(places):
        try:
            data = picture(reader.read(*place))
            header = judged_header(data)
            box = transform.crop(header.height, header.width, sample_rng(0, 0, number))
            decoded = decode(data, header, transform.min_side(box, header))
        except BadSample:
            continue
        for values, value in zip(pictures, (place, data, decoded, cut(decoded, box, header)), strict=True):
            values.append(value)  # type: ignore[attr-defined]
    if not pictures.data:
        raise ValueError(f"none of the first {len(places)} samples of {shards} can be decoded; give other shards")
    return pictures


def _single(
    reader: ShardReader, pictures: Pictures, transform: ImageTransform, grid: int, tokenizer: AnyTokenizer | None
) -> dict[str, Callable[[int], object]]:
    data, crops = pictures.data, pictures.crops
    rngs = [sample_rng(0, 1, number) for number in range(len(data))]
    headers = [judged_header(each) for each in data]
    boxes = [transform.crop(h.height, h.width, sample_rng(0, 0, n)) for n, h in enumerate(headers)]
    sides = [transform.min_side(box, header) for box, header in zip(boxes, headers, strict=True)]
    place = np.zeros((3, transform.size, transform.size), np.uint8)
    still = replace(transform, flip=False, jitter=0.0)
    plain = replace(still, antialias=False)
    calls: dict[str, Callable[[int], object]] = {
        "read": lambda i: reader.read(*pictures.places[i], IMAGE_EXTENSIONS),
        "generator": lambda i: sample_rng(0, 0, i),
        "header": lambda i: judged_header(data[i]),
        "crop_box": lambda i: transform.crop(headers[i].height, headers[i].width, rngs[i]),
        "decode": lambda i: decode(data[i], headers[i], sides[i]),
        "resize": lambda i: plain.finish(crops[i], rngs[i], place),  # and its three planes
        "resize_blurred": lambda i: still.finish(crops[i], rngs[i], place),
        "resize_flip_jitter": lambda i: transform.finish(crops[i], rngs[i], place),
        "mask": lambda i: mask_image(grid, IMAGE_RATIO, rngs[i]),
        "whole": lambda i: transform(data[i], sample_rng(0, 0, i), place),
        "whole_jitter_on_device": lambda i: transform.unfinished(data[i], sample_rng(0, 0, i), place),
    }
    if tokenizer is not None:
        ids = caption_ids(CAPTION, tokenizer, TEXT_LEN)
        calls["caption_ids"] = lambda i: caption_ids(CAPTION, tokenizer, TEXT_LEN)
        calls["text_mask"] = lambda i: mask_text(ids, TEXT_RATIO, mask_id=tokenizer.mask_id, rng=rngs[i])
    return calls


def _batched(count: int, size: int, patch_size: int) -> dict[str, Callable[[int], object]]:
    """What is done once a batch: its masks in one tensor and its index; and its way to the main process."""
    grid = size // patch_size
    layout = Layout(images=count, patches=grid**2)
    masks = [mask_image(grid, IMAGE_RATIO, sample_rng(0, 0, number)) for number in range(count)]
    parcel, opened = Parcel((count, 3, size, size), 1), Opened()
    images = torch.from_numpy(parcel.array)

    def stack(_: int) -> object:
        return make_batch(layout, images=images, image_masks=torch.from_numpy(np.stack(masks))).indexed()

    batch = stack(0)
    return {"stack": stack, "transfer": lambda _: opened.open(parcel.fd, parcel.number, *parcel.close_with(batch))}


def _least(calls: dict[str, Callable[[int], object]], count: int, seconds: float) -> dict[str, float]:
    """CPU seconds of call(0), ..., call(count - 1), all calls in turns: the least of each, and their mean."""
    least = {name: [float("inf")] * count for name in calls}
    start, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            times = least[name]
            for number in range(count):
                begun = time.thread_time()
                call(number)
                times[number] = min(times[number], time.thread_time() - begun)
        rounds += 1
    return {name: float(np.mean(times)) for name, times in least.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.loader_parts", __doc__, "--pictures 256 --seconds 5")
    parser.add_argument("--pictures", nargs="+", choices=PICTURES, default=list(PICTURES))
    parser.add_argument("--samples", type=int, default=32, help="JPEGs of each kind (%(default)s)")
    parser.add_argument("--size", type=int, default=224, help="pixels of the crop (%(default)s)")
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--cover", nargs="+", type=float, default=[1.0], help="transform.cover, one or more (1)")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each kind and cover (%(default)s)")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer's file: also measure a caption of 17 words")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    torch.set_num_threads(1)
    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else None
    facts = about("benchmarks.loader_parts", arguments) | machine("opencv-python-headless", "simplejpeg")
    results: dict[str, dict[str, float]] = {}
    for name in args.pictures:
        with tempfile.TemporaryDirectory() as directory:
            write_synthetic(Path(directory), args.samples, *PICTURES[name])
            for cover in args.cover:
                transform = ImageTransform(size=args.size, cover=cover)
                title = name if cover == 1 else f"{name}, cover {cover:g}"
                results[title] = parts(directory, transform, args.patch_size, args.seconds, tokenizer)
    load = round(os.getloadavg()[0], 1)
    write(facts | {"size": args.size, "load": load, "us_per_picture": results}, args.out)


if __name__ == "__main__":
    sys.exit(main())
