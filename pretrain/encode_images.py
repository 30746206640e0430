"""Stores the visual tokenizer's codes of every picture beside the shards, so that training need not run it.

    python -m pretrain.encode_images data/cc12m --tokenizer runs/base/tokenizer --crops 4 --recipe beit3_base \\
        --stage fusion

A stage then sees CROPS fixed crops of each picture, one per epoch, and reads their codes: set `crops` and `codes` of
its sources. The codes are those that training would compute itself: the same pixels, from the recipe's transform and
seed, through the same function (in bf16 on a GPU, otherwise in fp32). pretrain/data/codes.py describes the files.
launch/chain.sh does it for the word `codes` among its stages.

Finished shards stay: after a kill, run the same command to continue. Several machines share the work with --part 0/8,
1/8, ..., and so do the ranks of torchrun or srun. Encode after data_tools.rewrite: codes depend on the order of the
samples and on the bytes of the pictures.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pretrain.checkpoint.weights import weights_digest
from pretrain.command import add_directories, add_workers, make_parser, part_of, run
from pretrain.config import Recipe, Stage
from pretrain.data.codes import DTYPE, NO_CODE, Coding, file_heads, look_rng, plain, read_summary, summary
from pretrain.data.pool import Item, Pool
from pretrain.data.pulse import beat
from pretrain.data.shards.indexing import check_writable, index_directory, write_beside
from pretrain.data.shards.manifest import load_manifest
from pretrain.data.shards.reader import IMAGE_EXTENSIONS, BadSample, ShardReader
from pretrain.data.sources import ImageShards, picture
from pretrain.data.transforms import ImageTransform
from pretrain.distributed import device, rank, world_size
from pretrain.files import write_file
from pretrain.models.visual_tokenizer.vqkd import VQKD
from pretrain.parallel.launcher import adopt_launcher
from pretrain.recipes import load_recipe
from pretrain.rows import sent
from pretrain.run.image_targets import load_visual_tokenizer, picture_codes
from pretrain.run.stored_weights import weights_path
from pretrain.visible import visible

AHEAD = 2  # stretches that a worker prefetches


class Encoder(NamedTuple):
    """The tokenizer on its device, and the coding that its codes follow."""

    tokenizer: VQKD
    transform: ImageTransform
    coding: Coding
    name: str  # extension of the files


class Result(NamedTuple):
    """The result for one directory. `remaining`: shards that other parts still have to encode."""

    shards: int
    pictures: int
    bad: int
    remaining: int


class _Stretch(NamedTuple):
    """Neighbouring samples of a shard whose looks go through the tokenizer together."""

    shard: int
    first: int
    samples: int


class _Looks:
    """A pool's work: item (number of the stretch, 0) -> (uint8 [decodable * crops, 3, size, size], bool [count]: which
    pictures could be decoded), or the error that ends the command."""

    def __init__(self, reader: ShardReader, stretches: list[_Stretch], transform: ImageTransform, coding: Coding):
        self.reader, self.stretches, self.transform, self.coding = reader, stretches, transform, coding

    @property
    def pictures(self) -> tuple[int, ...]:
        most = max((stretch.samples for stretch in self.stretches), default=0)
        return most * self.coding.crops, 3, self.transform.size, self.transform.size

    def make(self, item: Item, pictures: np.ndarray) -> tuple[Tensor, Tensor] | Exception:
        shard, first, count = self.stretches[item[0]]
        decodable, crops, good = torch.zeros(count, dtype=torch.bool), self.coding.crops, 0
        for number in range(count):
            beat()
            try:
                for look, own in enumerate(self._looks(shard, first + number)):
                    pictures[good * crops + look] = own
            except BadSample:
                continue
            except (ValueError, OSError) as error:
                return error
            decodable[number], good = True, good + 1
        return torch.from_numpy(pictures[: good * crops]), decodable

    def _looks(self, shard: int, sample: int) -> list[np.ndarray]:
        members = self.reader.read(shard, sample, IMAGE_EXTENSIONS)
        data, key, seed = picture(members), members["__key__"], self.coding.seed
        # Decode once per look: the size at which a JPEG is decoded depends on it, and pixels must equal training's.
        return [self.transform(data, look_rng(seed, key, look)) for look in range(self.coding.crops)]

    def results(self, workers: int) -> Generator[Any, None, None]:
        """The result of each stretch, in order; with 0 `workers` this process makes them."""
        items = ((number, 0) for number in range(len(self.stretches)))
        if not workers:
            yield from (self.make(item, np.empty(self.pictures, np.uint8)) for item in items)
            return
        with Pool(self, workers, AHEAD) as pool:
            yield from pool.results(items)


def encode_directory(
    directory: Path, encoder: Encoder, *, part: int = 0, parts: int = 1, batch: int = 256, workers: int = 2
) -> Result:
    """Writes NNNNN.NAME beside the shards part, part + parts, ..., and NAME.json once every shard has its codes.
    `batch`: looks per pass of the tokenizer. Raises ValueError if other codes already have this name, or if no picture
    can be decoded."""
    index_directory(directory)
    reader = ShardReader(load_manifest(str(directory)))
    shards = reader.manifest.shards
    paths = [Path(shard.beside(f"{shard.name.removesuffix('.tar')}.{encoder.name}")) for shard in shards]
    heads = [file_heads(encoder.coding, reader.index(number)) for number in range(len(shards))]
    _refuse_others(directory, encoder)
    todo = [k for k in range(part, len(shards), parts) if not _is_done(paths[k], heads[k], encoder, shards[k].samples)]
    pictures = bad = 0
    if todo:
        check_writable(directory)
    total = sum(shards[k].samples for k in todo)
    with tqdm(total=total, desc=visible(f"encoding {directory}"), unit=" pictures", disable=None) as bar:
        for shard, codes in _codes(reader, todo, encoder, batch, workers, bar):
            write_file(paths[shard], heads[shard][0] + codes.tobytes())
            pictures += len(codes)
            bad += int((codes[:, 0, 0] == NO_CODE).sum())
    if pictures and bad == pictures and len(todo) == len(shards):
        for shard in todo:
            paths[shard].unlink()
        raise ValueError(
            f"none of the {bad} samples of {directory} has a picture that can be decoded; give other shards"
        )
    remaining = sum(not _is_done(paths[k], heads[k], encoder, shards[k].samples) for k in range(len(shards)))
    if not remaining:
        done = {shard.name: shard.samples for shard in shards}
        write_beside(directory / f"{encoder.name}.json", summary(encoder.coding, done))
    return Result(len(todo), pictures, bad, remaining)


def _codes(
    reader: ShardReader, todo: list[int], encoder: Encoder, batch: int, workers: int, bar: tqdm
) -> Iterator[tuple[int, np.ndarray]]:
    """(shard, uint16 [samples, crops, patches]) for each shard, empty ones included."""
    coding, samples = encoder.coding, reader.manifest.counts
    step = max(1, batch // coding.crops)
    stretches = [
        _Stretch(shard, first, min(step, samples[shard] - first))
        for shard in todo
        for first in range(0, samples[shard], step)
    ]
    results, on = _Looks(reader, stretches, encoder.transform, coding).results(workers), device()
    items = zip(stretches, results, strict=True)
    with closing(results):  # ends the workers, also with an error
        for shard in todo:
            codes = np.full((samples[shard], coding.crops, coding.patches), NO_CODE, DTYPE)
            filled = 0
            while filled < samples[shard]:
                stretch, looks = next(items)
                if isinstance(looks, Exception):
                    raise looks
                pixels, decodable = looks
                if len(pixels):
                    computed = picture_codes(encoder.tokenizer, sent(pixels, on)).cpu().numpy()
                    samples_in_shard = np.flatnonzero(decodable.numpy()) + stretch.first
                    codes[samples_in_shard] = computed.reshape(len(samples_in_shard), coding.crops, coding.patches)
                filled += stretch.samples
                bar.update(stretch.samples)
            yield shard, codes


def _is_done(path: Path, heads: tuple[bytes, ...], encoder: Encoder, samples: int) -> bool:
    try:
        with path.open("rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(len(heads[0]))
            return head in heads and size == len(head) + samples * encoder.coding.item_bytes
    except FileNotFoundError:
        return False


def _refuse_others(directory: Path, encoder: Encoder) -> None:
    path = directory / f"{encoder.name}.json"
    if not path.exists():
        return
    existing, _ = read_summary(path.read_bytes(), str(path))
    if differences := existing.differences(encoder.coding, "this call"):
        raise ValueError(
            f"{path} says that other codes already exist: {differences}; choose another --name, or remove them "
            f"(*.{encoder.name} and {path.name})"
        )


def load_encoder(recipe: Recipe, stage: Stage, tokenizer: str, crops: int, name: str) -> Encoder:
    """The encoder whose codes are those that the stage would compute itself. Raises ValueError if the arguments do not
    go together."""
    if stage.masking is None:
        raise ValueError("--stage names a stage that predicts no codes; name one that does")
    if not stage.transform.train:
        raise ValueError("transform.train=False, so the stage has no random crops; set transform.train=True")
    if crops < 1:
        raise ValueError(f"--crops {crops} is below 1; use the number of crops per picture, such as 4")
    ImageShards("", crops, name)  # raises for a name that recipes do not accept
    stage = replace(stage, visual_tokenizer=tokenizer)
    model = load_visual_tokenizer(recipe, stage, Path())
    if model.cfg.codes > NO_CODE:
        raise ValueError(f"--tokenizer {tokenizer} has {model.cfg.codes} codes; at most {NO_CODE} can be stored")
    if model.cfg.image_size != stage.transform.size:
        raise ValueError(
            f"--tokenizer {tokenizer} takes pictures of {model.cfg.image_size} pixels, but transform.size="
            f"{stage.transform.size}; use one size"
        )
    digest = weights_digest(weights_path(tokenizer, Path(), "--tokenizer"))
    coding = Coding(digest, plain(stage.transform), recipe.seed, crops, model.cfg.patches)
    return Encoder(model.to(device()), stage.transform, coding, name)


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    parser = make_parser(
        "pretrain.encode_images",
        __doc__,
        "data/cc12m --tokenizer runs/base/tokenizer --crops 4 --recipe beit3_base --stage fusion",
    )
    add_directories(parser)
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="a stage's directory, or its weights.safetensors"
    )
    parser.add_argument(
        "--crops", required=True, type=int, metavar="N", help="crops of each picture, one per epoch of training"
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help="as in training: a name, or a .py file")
    parser.add_argument(
        "--stage", required=True, metavar="NAME", help="the stage that will read the codes (its transform is used)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in training")
    parser.add_argument(
        "--name", default="codes", metavar="NAME", help="extension of the files, codes... (%(default)s)"
    )
    parser.add_argument(
        "--part", metavar="I/N", help="encode every N-th shard from the I-th on, from 0 (a launcher's rank, else 0/1)"
    )
    parser.add_argument(
        "--batch", type=int, default=256, metavar="N", help="crops per pass of the tokenizer (%(default)s)"
    )
    add_workers(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    return run(lambda: _run(args), state="finished shards stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    adopt_launcher()
    part, parts = part_of(args.part or f"{rank()}/{world_size()}")
    if args.batch < 1 or args.workers < 0:
        raise ValueError(f"--batch {args.batch} or --workers {args.workers} is too small; use 256 and 2")
    encoder = load_encoder(*load_recipe(args.recipe, args.stage, args.set), args.tokenizer, args.crops, args.name)
    for directory in args.directories:
        result = encode_directory(
            directory,
            encoder,
            part=part,
            parts=parts,
            batch=args.batch,
            workers=args.workers,
        )
        print(
            f"{directory}: {result.pictures:,} pictures in {result.shards} shards encoded"
            + (f", {result.bad:,} of them cannot be decoded" if result.bad else "")
            + (f"; {result.remaining} shards remain for other parts" if result.remaining else "")
        )
    if not result.remaining:
        print(f"now set crops={args.crops}, codes={args.name!r} in the recipe's sources of these shards")


if __name__ == "__main__":
    sys.exit(main())
