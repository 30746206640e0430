"""Finds duplicate pictures: equal bytes, or the same picture resized, recoded, brightened or slightly cropped.

    python -m data_tools.dedup data/cc12m data/laion

Changes nothing: DIR/drops/dedup.parquet names the samples to drop, and `data_tools.rewrite` drops them. Of several
directories the first has priority. Only pictures are compared: of one picture with two captions, one sample is kept.

Of similar pictures the one with the most pixels is kept, because the others were made from it; among equals the first
by shard and key. A sample is dropped only if it is near to one that is *kept*, so that a chain of pictures, each a
little different from the last, does not collapse into one. Two pictures are similar if at most --distance of the 64
bits of their perceptual hashes differ (pictures/hashes.py), their small thumbnails agree in colours and grey levels,
and both have enough detail for a meaningful hash; blank pictures are duplicates only if their bytes are equal. Samples
that other files in DIR/drops name do not take part, so that no picture is dropped in favour of one that is dropped too:
run this after the filters.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.pictures.contact_sheet import Pair, write_contact_sheet
from data_tools.pictures.hashes import Hashes, hash_shards, look_alike
from data_tools.pictures.near import keep_first
from data_tools.shards.steps import Drop, Step, read_drops, write_drops, write_step
from pretrain.command import add_directories, add_workers, make_parser, run
from pretrain.data.shards.indexing import check_writable, complete_shards
from pretrain.visible import say

NAME = "dedup"
EXACT, NEAR = "exact_duplicate", "near_duplicate"
# Recall at 4 | 6 bits, measured on 150 pictures each of drawn scenes (64 and 256 pixels) and of noise with a photo's
# spectrum: JPEG quality 30 96-100 | 99-100 %, resized 99-100 | 100 %, brightness 1.3 89-98 | 95-99 %, cropped by 1 % on
# each side 65-95 | 85-99 %, by 2 % 53-65 | 74-91 %, by 4 % 2-13 | 9-25 %. Of 3,000 drawn scenes, which look very
# similar, 1.4 | 2.3 % are dropped by mistake (a star for a cross of its colour at its place); noise pictures are at
# least 14 bits apart.
DISTANCE = 4


@dataclass(frozen=True)
class Duplicates:
    """The result for all samples, in the order of the directories, their shards and keys."""

    excluded: np.ndarray  # bool: already dropped by another tool
    original: np.ndarray  # int64: the kept sample that it repeats; -1: kept itself
    distance: np.ndarray  # uint8: bits that differ from the original
    exact: np.ndarray  # bool: the original has the same bytes


def find_duplicates(parts: list[Hashes], excluded: np.ndarray, distance: int | None = DISTANCE) -> Duplicates:
    """Over all samples of `parts`; `distance` None: equal bytes only. Takes 100 bytes per sample
    besides the hashes, and a copy of the hashes if there are several directories."""
    total = len(excluded)
    place = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.lexsort((np.arange(total), -_concatenate(parts, "pixels"), place))
    order = order[(_concatenate(parts, "pictures") & ~excluded)[order]]
    original, bits = np.full(total, -1, np.int64), np.zeros(total, np.uint8)
    first = order[_first_equal(_concatenate(parts, "sha256")[order])]
    same = first != order
    original[order[same]] = first[same]
    if distance is not None:
        candidates = order[~same & _concatenate(parts, "usable")[order]]
        thumbnails = _concatenate(parts, "thumbnails")

        def similar(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            return look_alike(thumbnails[candidates[one]], thumbnails[candidates[other]])

        near = keep_first(_concatenate(parts, "phash")[candidates], distance, similar)
        near_rows = near.item >= 0
        original[candidates[near_rows]] = candidates[near.item[near_rows]]
        bits[candidates[near_rows]] = near.distance[near_rows]
    exact = np.zeros(total, bool)
    exact[order[same]] = True
    # An exact copy of a sample that is itself a near duplicate becomes a near duplicate of the same original.
    indirect = np.flatnonzero(exact & (original >= 0) & (original[original] >= 0))
    exact[indirect], bits[indirect] = False, bits[original[indirect]]
    original[indirect] = original[original[indirect]]
    return Duplicates(excluded, original, bits, exact)


def _concatenate(parts: list[Hashes], name: str) -> np.ndarray:
    columns = [getattr(part, name) for part in parts]
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _first_equal(sha256: np.ndarray) -> np.ndarray:
    """For each row of uint64 [N, 2], the index of the first row that equals it."""
    order = np.lexsort((sha256[:, 1], sha256[:, 0]))  # stable: equal rows stay in their order
    ranked = sha256[order]
    new = np.ones(len(order), bool)
    new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    first = np.empty(len(order), np.int64)
    first[order] = order[starts[np.cumsum(new) - 1]] if len(order) else 0
    return first


def dropped_already(part: Hashes) -> np.ndarray:
    """bool [N]: the samples that other tools' files in DIR/drops name."""
    out = np.zeros(len(part), bool)
    files = sorted(path for path in (part.directory / "drops").glob("*.parquet") if path.stem != NAME)
    wanted: dict[str, set[str]] = {}
    for drop in read_drops(files):
        wanted.setdefault(drop.shard, set()).add(drop.key)
    for number, file in enumerate(part.files):
        if file.stem in wanted:
            rows = np.arange(part.starts[number], part.starts[number + 1])
            out[rows] = [key in wanted[file.stem] for _, key, _, _ in part.locate(rows)]
    return out


def check_directories(directories: Iterable[Path]) -> None:
    """Raises ValueError for a directory that is given twice: all its samples would be duplicates of themselves."""
    twice = [path for path, count in Counter(map(os.path.realpath, directories)).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; name each directory once")


def _drops(parts: list[Hashes], number: int, duplicates: Duplicates) -> Iterator[Drop]:
    starts = _starts(parts)
    part = parts[number]
    for low, high in zip(part.starts[:-1], part.starts[1:], strict=True):
        here = np.arange(low, high) + starts[number]
        here = here[duplicates.original[here] >= 0]
        names = part.locate(here - starts[number])
        originals = _names(parts, duplicates.original[here])
        for row, (shard, key, _, _), original in zip(here.tolist(), names, originals, strict=True):
            if duplicates.exact[row]:
                yield Drop(shard, key, EXACT, original)
            else:
                yield Drop(shard, key, NEAR, f"{original} distance={duplicates.distance[row]}")


def _starts(parts: list[Hashes]) -> np.ndarray:
    return np.cumsum([0, *(len(part) for part in parts)])


def _names(parts: list[Hashes], rows: np.ndarray) -> list[str]:
    """DIR/shard/key of samples counted through all directories."""
    return [f"{parts[number].directory}/{shard}/{key}" for number, shard, key, _, _ in _locate(parts, rows)]


def _locate(parts: list[Hashes], rows: np.ndarray) -> list[tuple[int, str, str, int, int]]:
    starts = _starts(parts)
    numbers = np.searchsorted(starts, rows, side="right") - 1
    samples: list = [None] * len(rows)
    for number in np.unique(numbers).tolist():
        places = np.flatnonzero(numbers == number)
        for place, names in zip(places.tolist(), parts[number].locate(rows[places] - starts[number]), strict=True):
            samples[place] = number, *names
    return samples


def write_result(parts: list[Hashes], duplicates: Duplicates, settings: dict) -> list[Step]:
    """DIR/drops/dedup.parquet and DIR/steps/dedup.json for each directory."""
    starts, steps = _starts(parts), []
    for number, part in enumerate(parts):
        counts = write_drops(part.directory / "drops" / f"{NAME}.parquet", _drops(parts, number, duplicates))
        excluded = int(duplicates.excluded[starts[number] : starts[number + 1]].sum())
        rows = len(part) - excluded
        step = Step(
            tool="data_tools.dedup",
            rows=rows,
            kept=rows - counts.total(),
            dropped=dict(counts),
            settings=settings | {"dropped_before": excluded, "cannot_be_decoded": part.damaged},
            inputs=[str(other.directory) for other in parts],
        )
        write_step(part.directory, NAME, step)
        steps.append(step)
    return steps


def _show(parts: list[Hashes], duplicates: Duplicates, path: Path, most: int) -> int:
    """A sheet of near duplicates, the most different ones first: if these are right, so are the others."""
    near = np.flatnonzero((duplicates.original >= 0) & ~duplicates.exact)
    near = near[np.argsort(-duplicates.distance[near].astype(int), kind="stable")][:most]
    pairs = []
    for (n, shard, key, at, size), (m, shard2, key2, at2, size2), bits in zip(
        _locate(parts, near), _locate(parts, duplicates.original[near]), duplicates.distance[near].tolist(), strict=True
    ):
        one, other = parts[n].directory / f"{shard}.tar", parts[m].directory / f"{shard2}.tar"
        pairs.append(Pair((one, at, size), (other, at2, size2), f"{shard}/{key} | {shard2}/{key2}: {bits} bits"))
    write_contact_sheet(path, pairs)
    return len(pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("data_tools.dedup", __doc__, "data/cc12m --distance 4 --show pairs.png")
    add_directories(parser)
    parser.add_argument(
        "--distance",
        type=int,
        default=DISTANCE,
        metavar="BITS",
        help="of the 64 hash bits, how many may differ (%(default)s)",
    )
    parser.add_argument("--exact-only", action="store_true", help="drop only pictures with equal bytes")
    parser.add_argument(
        "--show", type=Path, metavar="PNG", help="also write a picture of the most different near duplicates"
    )
    add_workers(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="finished hashes are stored; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    check_distance(args.distance)
    check_directories(args.directories)
    if args.show is not None and args.show.suffix.lower() != ".png":
        raise ValueError(f"--show={args.show} does not end in .png; use {args.show.with_suffix('.png')}")
    for directory in args.directories:
        complete_shards(directory)  # reports a wrong path before hours of hashing
        check_writable(directory)
    parts = [hash_shards(directory, args.workers) for directory in args.directories]
    start = time.perf_counter()
    excluded = np.concatenate([dropped_already(part) for part in parts])
    distance = None if args.exact_only else args.distance
    duplicates = find_duplicates(parts, excluded, distance)
    steps = write_result(parts, duplicates, {"distance": distance})
    width = max(len(str(part.directory)) for part in parts)
    print(
        f"{'':{width}}  {'samples':>11} {'pictures':>11} {'flat':>9} {'unreadable':>10} {EXACT:>15} {NEAR:>14} "
        f"{'kept':>11}"
    )
    for part, step in zip(parts, steps, strict=True):
        pictures = int(part.pictures.sum())
        flat = pictures - int(part.usable.sum()) - part.damaged
        exact, near = (step.dropped.get(reason, 0) for reason in (EXACT, NEAR))
        print(
            f"{part.directory!s:{width}}  {step.rows:11,} {pictures:11,} {flat:9,} {part.damaged:10,} {exact:15,} "
            f"{near:14,} {step.kept:11,}"
        )
    for part, step in zip(parts, steps, strict=True):
        if before := step.settings["dropped_before"]:
            say(f"{part.directory}: {before:,} samples were not compared because other files in drops/ name them")
    print(f"compared in {time.perf_counter() - start:.1f} s; wrote drops/{NAME}.parquet and steps/{NAME}.json")
    if args.show is not None:
        say(f"{args.show}: {_show(parts, duplicates, args.show, 48)} pairs")


def check_distance(distance: int) -> None:
    if not 0 <= distance <= 16:
        raise ValueError(f"--distance={distance} is wrong because beyond 16 of 64 bits any pictures match; use 0 to 16")


if __name__ == "__main__":
    sys.exit(main())
