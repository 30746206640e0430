"""Finds pictures and captions of evaluation sets in training shards, so that they can be dropped.

    python -m data_tools.leaks data/cc12m --against coco=coco/val2014 --captions coco=annotations/captions_val2014.json

Changes nothing: DIR/drops/leaks.parquet names the samples to drop, and `data_tools.rewrite` drops them.

A picture has leaked if its bytes equal those of an evaluation picture, or if at most --distance of the 64 bits of their
perceptual hashes differ (pictures/hashes.py) and their thumbnails agree; mirror images count too. The distance is
wider than dedup's, because a missed leak costs more than a lost sample. A caption (a sample's txt, or one of the
`captions` of its JSON) has leaked if it equals an evaluation caption, ignoring case, punctuation and blanks, and has at
least --caption-words words: shorter ones are equal by chance. Undetected: greyscale copies of coloured pictures, and
crops of more than about 2 %.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_tools.dedup import check_directories, check_distance
from data_tools.pictures.evaluation_set import EvaluationSet, read_evaluation_set
from data_tools.pictures.hashes import FOLDER, Hashes, hash_shards, look_alike
from data_tools.pictures.near import nearest
from data_tools.shards.steps import Drop, Step, write_drops, write_step
from pretrain.command import add_directories, add_workers, make_parser, run
from pretrain.data.shards.indexing import check_writable, complete_shards
from pretrain.visible import say

NAME = "leaks"
DISTANCE, LEAST_WORDS = 6, 6
_MAX_NAMED = 5  # damaged pictures that are named; the others are only counted


@dataclass
class Leaks:
    """The leaks of one evaluation set in one directory. [N] are the directory's samples."""

    evaluation: EvaluationSet
    match: np.ndarray  # int64 [N]: index of a similar picture in the set's hashes, -1: none; independent of `equal`
    distance: np.ndarray  # uint8 [N]
    equal: np.ndarray  # bool [N]: the same bytes
    caption: np.ndarray  # bool [N]
    matched_pictures: set[int] = field(default_factory=set)

    @property
    def picture(self) -> np.ndarray:
        return self.equal | (self.match >= 0)

    def detail(self, row: int) -> str:
        index, pictures = int(self.match[row]), len(self.evaluation.names)
        if self.equal[row]:  # index -1: a flat picture, which has only its bytes to compare
            return f"{self.evaluation.names[index % pictures]} equal bytes" if index >= 0 else "equal bytes"
        mirrored = " mirrored" if index >= pictures else ""
        return f"{self.evaluation.names[index % pictures]} distance={self.distance[row]}{mirrored}"


def find_leaks(hashes: Hashes, evaluation: EvaluationSet, distance: int, least_words: int) -> Leaks:
    """`least_words` 0: captions are not compared."""
    usable = np.flatnonzero(hashes.usable)

    def similar(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return look_alike(hashes.thumbnails[usable[one]], evaluation.thumbnails[other])

    near = nearest(hashes.phash[usable], evaluation.phash, distance, similar)
    match, bits = np.full(len(hashes), -1, np.int64), np.zeros(len(hashes), np.uint8)
    match[usable], bits[usable] = near.item, near.distance
    digests = {bytes(row) for row in evaluation.sha256}
    candidates = np.flatnonzero(hashes.pictures & np.isin(hashes.sha256[:, 0], evaluation.sha256[:, 0]))
    equal = np.zeros(len(hashes), bool)
    equal[candidates] = [bytes(row) in digests for row in hashes.sha256[candidates]]
    caption = np.zeros(len(hashes), bool)
    caption[hashes.sample[np.isin(hashes.captions, evaluation.captions) & (hashes.words >= max(least_words, 1))]] = True
    matched_pictures = set((match[match >= 0] % max(len(evaluation.names), 1)).tolist())
    return Leaks(evaluation, match, bits, equal, caption & bool(least_words), matched_pictures)


def _drops(hashes: Hashes, leaks: list[Leaks]) -> Iterator[Drop]:
    """One line per sample: the first set with its picture, otherwise the first set with its caption."""
    leaked = np.any([leak.picture | leak.caption for leak in leaks], axis=0)
    for low, high in zip(hashes.starts[:-1], hashes.starts[1:], strict=True):
        rows = np.arange(low, high)[leaked[low:high]]
        for row, (shard, key, _, _) in zip(rows.tolist(), hashes.locate(rows), strict=True):
            yield _drop(shard, key, row, leaks)


def _drop(shard: str, key: str, row: int, leaks: list[Leaks]) -> Drop:
    for leak in leaks:
        if leak.picture[row]:
            return Drop(shard, key, f"leak:{leak.evaluation.name}:picture", leak.detail(row))
    leak = next(leak for leak in leaks if leak.caption[row])
    return Drop(shard, key, f"leak:{leak.evaluation.name}:caption", "")


def write_result(hashes: Hashes, leaks: list[Leaks], settings: dict) -> Step:
    """DIR/drops/leaks.parquet and DIR/steps/leaks.json."""
    counts = write_drops(hashes.directory / "drops" / f"{NAME}.parquet", _drops(hashes, leaks))
    step = Step(
        tool="data_tools.leaks",
        rows=len(hashes),
        kept=len(hashes) - counts.total(),
        dropped=dict(counts),
        settings=settings,
        inputs=[str(hashes.directory)],
    )
    write_step(hashes.directory, NAME, step)
    return step


def _parse_paths(values: list[str], option: str) -> dict[str, Path]:
    """The NAME=PATH arguments of an option."""
    paths: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (equals and path and name.isidentifier()):
            raise ValueError(f"{option}={value} is wrong because it is not NAME=PATH with a name of letters and digits")
        if name in paths:
            raise ValueError(f"{option} {name}=... is given twice; use another name")
        paths[name] = Path(path)
    return paths


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("data_tools.leaks", __doc__, "data/cc12m --against coco=coco/val2014 --against f30k=flickr30k")
    add_directories(parser)
    parser.add_argument(
        "--against",
        action="append",
        required=True,
        metavar="NAME=PATH",
        help="an evaluation set: a folder of pictures or of shards",
    )
    parser.add_argument(
        "--captions",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="the captions of that set: COCO's JSON, a CSV, ...",
    )
    parser.add_argument(
        "--distance",
        type=int,
        default=DISTANCE,
        metavar="BITS",
        help="of the 64 hash bits, how many may differ (%(default)s)",
    )
    parser.add_argument(
        "--caption-words",
        type=int,
        default=LEAST_WORDS,
        metavar="N",
        help="minimum length of captions to compare; 0 compares none (%(default)s)",
    )
    add_workers(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="finished hashes are stored; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    sets = _evaluation_sets(args)
    settings = {
        "distance": args.distance,
        "caption_words": args.caption_words,
        "against": {one.name: one.pictures for one in sets},
    }
    for directory in args.directories:
        hashes = hash_shards(directory, args.workers)
        leaks = [find_leaks(hashes, one, args.distance, args.caption_words) for one in sets]
        step = write_result(hashes, leaks, settings)
        say(f"{directory}: {step.rows:,} samples, {step.rows - step.kept:,} to drop")
        for leak in leaks:
            one = leak.evaluation
            print(
                f"  {one.name}: {int(leak.picture.sum()):,} samples with one of its pictures "
                f"({len(leak.matched_pictures):,} of {one.pictures:,} match, {int(leak.equal.sum()):,} by bytes),  "
                f"{int(leak.caption.sum()):,} with one of its captions"
            )
        say(f"  by reason: {dict(Counter(step.dropped)) or 'nothing'}; see {directory / 'drops' / NAME}.parquet")


def _evaluation_sets(args: argparse.Namespace) -> list[EvaluationSet]:
    check_distance(args.distance)
    against, captions = _parse_paths(args.against, "--against"), _parse_paths(args.captions, "--captions")
    if unknown := set(captions) - set(against):
        raise ValueError(
            f"--captions {min(unknown)}=... belongs to no set; those of --against are {', '.join(against)}"
        )
    if args.caption_words < 0:
        raise ValueError(f"--caption-words={args.caption_words} is wrong because it counts words; use 6, or 0 for none")
    check_directories([*args.directories, *against.values()])
    for directory in args.directories:
        complete_shards(directory)  # reports a wrong path before the evaluation sets are read
        check_writable(directory)
    sets = []
    for name, path in against.items():
        folder = args.directories[0] / FOLDER / NAME / name
        one = read_evaluation_set(name, path, captions.get(name), args.caption_words, args.workers, folder)
        print(
            f"{name}: {one.pictures:,} pictures, {one.flat:,} of them too flat to compare more than their bytes, "
            f"{len(one.damaged):,} damaged; {len(one.captions):,} captions, {one.short:,} shorter ones are not compared"
            + (f"; {one.excluded:,} pictures of its training split are excluded" if one.excluded else "")
            + (f"; {len(one.bad_rows):,} rows of its captions cannot be read" if one.bad_rows else "")
        )
        for what, lines in (("damaged", one.damaged), (f"--captions {captions.get(name)}", one.bad_rows)):
            for line in lines[:_MAX_NAMED]:
                say(f"{what}: {line}", error=True)
            if len(lines) > _MAX_NAMED:
                say(f"{what}: {len(lines) - _MAX_NAMED} more", error=True)
        sets.append(one)
    return sets


if __name__ == "__main__":
    sys.exit(main())
