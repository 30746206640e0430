"""Draws a small corpus of scenes, in img2dataset's shard format, for trying out the whole system.

    python -m data_tools.sample_corpus --out runs/quickstart/corpus

    OUT/pairs/train   OUT/images/train   OUT/texts/train      what the stages train on
    OUT/pairs/heldout OUT/images/heldout OUT/texts/heldout    only scenes with held-out (colour, shape) combinations
    OUT/pairs/familiar                                        new scenes of the combinations that training has

Each directory contains 00000.tar (KEY.jpg, KEY.txt, KEY.json; pictures without text, texts without picture),
00000.parquet and 00000_stats.json, which is written last: a shard without it is not finished. --seed determines
everything, for any number of workers. Another call with the same arguments writes only what is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path

import pyarrow as pa
from tqdm import tqdm

from data_tools.drawn.captions import write_document
from data_tools.drawn.pairs import distinguishable, pair, sample_rng
from data_tools.drawn.scenes import Scene, draw_scene, encode_jpeg, random_scene
from data_tools.shards.writer import ShardWriter
from pretrain.command import add_workers, make_parser, run
from pretrain.data.shards.indexing import index_directory, map_in_order, stats_path
from pretrain.files import WRITING, write_json
from pretrain.json_files import read_object

VERSION = 1  # increase it if the drawings or the wording change
STAMP = "sample_corpus.json"
KINDS = ("pairs", "images", "texts")
SPLITS = ("train", "heldout", "familiar")
_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("url", "caption", "key", "status", "error_message")]
    + [(name, pa.int32()) for name in ("width", "height", "original_width", "original_height")]
    + [(name, pa.string()) for name in ("exif", "sha256")]
)


@dataclass(frozen=True)
class Corpus:
    """The settings that determine the corpus's bytes."""

    pairs: int = 12_000
    images: int = 6_000
    texts: int = 12_000
    held_out: int = 512
    size: int = 64
    seed: int = 0
    samples_per_shard: int = 1_000
    familiar: int = 256  # pairs; a corpus whose stamp lacks it was drawn before there were any, and gets them now

    def __post_init__(self) -> None:
        for name, value, least in [
            *((name, getattr(self, name), 0) for name in (*KINDS, "held_out", "familiar", "seed")),
            ("size", self.size, 32),
            ("samples_per_shard", self.samples_per_shard, 1),
        ]:
            if value < least:
                raise ValueError(f"{name}={value} is too small; use {least} or more")
        if self.size > 1024:
            raise ValueError(f"size={self.size} is above 1024 pixels, the maximum for scenes; use 64 to 1024")

    def count(self, kind: str, split: str) -> int:
        if split == "familiar":
            return self.familiar if kind == "pairs" else 0
        return self.held_out if split == "heldout" else getattr(self, kind)


@dataclass(frozen=True)
class Job:
    """One shard to write: the samples of these numbers, in this order."""

    corpus: Corpus
    kind: str
    split: str
    shard: int
    numbers: tuple[int, ...]
    directory: Path


@dataclass(frozen=True)
class Sample:
    picture: bytes | None
    text: str | None
    scenes: tuple[Scene, ...]


def write_corpus(out: Path, corpus: Corpus, *, workers: int = 2, overwrite: bool = False) -> bool:
    """Writes the missing parts of the corpus under `out`. -> whether there were any. Raises ValueError if `out` has
    another corpus (unless `overwrite`) or other files, or if there are no `held_out` distinguishable pairs."""
    if workers < 1:
        raise ValueError(f"workers={workers} is below 1; use 1 or more")
    _claim(out, corpus, overwrite=overwrite)
    jobs = missing(out, corpus)
    bar = tqdm(total=sum(len(job.numbers) for job in jobs), desc="drawing scenes", unit=" samples", disable=None)
    with bar, map_in_order(write_shard, jobs, workers) as results:
        for samples in results:
            bar.update(samples)
    changed = {job.directory for job in jobs}
    for directory in (out / kind / split for kind, split in product(KINDS, SPLITS) if corpus.count(kind, split)):
        if directory in changed or not (directory / "manifest.json").exists():
            index_directory(directory)  # writes the manifest that the loader reads
    return bool(jobs)


def missing(out: Path, corpus: Corpus) -> list[Job]:
    """The shards that are not finished."""
    jobs = []
    for kind, split in product(KINDS, SPLITS):
        directory, count = out / kind / split, corpus.count(kind, split)
        starts = [
            (shard, first)
            for shard, first in enumerate(range(0, count, corpus.samples_per_shard))
            if not stats_path(directory / f"{shard:05d}.tar").exists()
        ]
        needs_distinct = (kind, split) == ("pairs", "heldout") and starts
        numbers = distinguishable(corpus.seed, count) if needs_distinct else range(count)
        jobs += [
            Job(corpus, kind, split, shard, tuple(numbers[first : first + corpus.samples_per_shard]), directory)
            for shard, first in starts
        ]
    return jobs


def make_sample(corpus: Corpus, kind: str, split: str, number: int) -> Sample:
    if kind == "pairs":
        scene, caption, _, rng = pair(corpus.seed, split, number)
        return Sample(encode_jpeg(draw_scene(scene, corpus.size, rng)), caption, (scene,))
    rng = sample_rng(corpus.seed, kind, split, number)
    held_out = split == "heldout"
    if kind == "images":
        scene = random_scene(rng, held_out=held_out)
        return Sample(encode_jpeg(draw_scene(scene, corpus.size, rng)), None, (scene,))
    scenes = tuple(random_scene(rng, held_out=held_out) for _ in range(rng.choice((1, 1, 2))))
    return Sample(None, write_document(scenes, rng), scenes)


def write_shard(job: Job) -> int:
    """Write one shard. Returns the number of samples."""
    digits = math.ceil(math.log10(max(2, job.corpus.samples_per_shard)))  # of a key, as in img2dataset
    with ShardWriter(job.directory, samples_per_shard=len(job.numbers), first=job.shard, schema=_SCHEMA) as shard:
        for position, number in enumerate(job.numbers):
            key = f"{job.shard:05d}{position:0{digits}d}"
            sample = make_sample(job.corpus, job.kind, job.split, number)
            row = _row(job, key, number, sample)
            facts = row | {"held_out": job.split == "heldout", "scenes": [scene.facts() for scene in sample.scenes]}
            members = {
                "jpg": sample.picture,
                "txt": None if sample.text is None else sample.text.encode(),
                "json": json.dumps(facts, indent=4).encode(),
            }
            shard.write(key, {extension: data for extension, data in members.items() if data is not None}, row)
    return len(job.numbers)


def _row(job: Job, key: str, number: int, sample: Sample) -> dict:
    """The columns of img2dataset for one sample. The URL names its origin; it cannot be downloaded."""
    size = job.corpus.size if sample.picture else None
    return {
        "url": f"drawn:{job.kind}/{job.split}/{job.corpus.seed}/{number}",
        "caption": sample.text,
        "key": key,
        "status": "success",
        "error_message": None,
        "width": size,
        "height": size,
        "original_width": size,
        "original_height": size,
        "exif": "{}" if sample.picture else None,
        "sha256": hashlib.sha256(sample.picture).hexdigest() if sample.picture else None,
    }


def _claim(out: Path, corpus: Corpus, *, overwrite: bool) -> None:
    """Reserves `out` for this corpus. Raises ValueError if it contains something else."""
    stamp, wanted = out / STAMP, {"version": VERSION, **asdict(corpus)}
    if stamp.exists():
        try:
            existing = read_object(stamp)
        except ValueError:
            existing = {}
        if existing and {"familiar": Corpus.familiar} | existing == wanted:
            return
        if not overwrite:
            differences = ", ".join(
                f"{name}={existing.get(name) if existing else '?'}"
                for name in wanted
                if existing.get(name) != wanted[name]
            )
            raise ValueError(
                f"out={out} contains a corpus made with other arguments ({differences}); choose another directory, or "
                "--overwrite"
            )
        _remove_shards(out)
    elif out.exists() and any(not path.name.endswith(WRITING) for path in out.iterdir()):  # of a killed run
        raise ValueError(f"out={out} contains other files; choose an empty directory")
    out.mkdir(parents=True, exist_ok=True)
    write_json(stamp, wanted)


def _remove_shards(out: Path) -> None:
    """Removes the files of this tool and of the indexer, and nothing else."""
    for kind, split in product(KINDS, SPLITS):
        for pattern in ("?????_stats.json", "?????.tar", "?????.parquet", "?????.idx", "manifest.json"):
            for path in (out / kind / split).glob(pattern):
                path.unlink()
    (out / STAMP).unlink()


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("data_tools.sample_corpus", __doc__, "--out runs/quickstart/corpus --pairs 12000 --workers 4")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new directory")
    for name, text in (
        ("pairs", "pictures with captions to train on"),
        ("images", "pictures alone to train on"),
        ("texts", "documents to train on"),
        ("held_out", "held-out samples of each kind"),
        ("size", "side of a picture in pixels"),
        ("seed", "determines the corpus"),
        ("samples_per_shard", "maximum"),
        ("familiar", "pairs of new scenes of the combinations that training has"),
    ):
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(Corpus, name), metavar="N", help=f"{text} (%(default)s)")
    add_workers(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus made with other arguments")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_args(arguments)
    return run(lambda: _run(args), state="finished shards stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    names = [field.name for field in fields(Corpus)]
    corpus = Corpus(**{name: getattr(args, name) for name in names})
    new = write_corpus(args.out, corpus, workers=args.workers, overwrite=args.overwrite)
    print(f"{args.out}: {'written' if new else 'complete already'}")


if __name__ == "__main__":
    sys.exit(main())
