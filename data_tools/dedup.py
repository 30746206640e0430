"""Finds pictures that are there twice: with equal bytes, or alike though resized, recoded, brightened or cut a little.

    python -m data_tools.dedup data/cc12m data/laion

Changes nothing: DIR/drops/dedup.parquet names what to leave out, and `data_tools.rewrite` does it. Of several
directories the first has priority. Pictures are the unit: of one picture with two captions, one sample is kept.

Of alike pictures the one with the most pixels is kept, because the others were made from it; among equals the first by
shard and key. A sample is dropped only if it is near to one that is *kept*, so that a chain of pictures, each a little
different from the last, does not end as one. Alike means: at most --distance of the 64 bits of the perceptual hash
differ (pictures/hashes.py), small thumbnails agree in colours and grey levels, and both pictures have enough detail for
a hash to tell anything; blank pictures are duplicates only if their bytes are equal. Samples that the other files in
DIR/drops name already do not take part, so no picture is dropped for the sake of one that goes too: run this after the
filters.
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
from pretrain.data.shards.indexing import complete_shards

NAME = "dedup"
EXACT, NEAR = "exact_duplicate", "near_duplicate"
# Found of 150 pictures each, drawn scenes of 64 and 256 pixels and noise with a photo's spectrum, at 4 | 6 bits: JPEG
# at 30 96-100 | 99-100 %, resized 99-100 | 100 %, brightness 1.3 89-98 | 95-99 %, cut by 1 % on each side 65-95 | 85-99
# %, by 2 % 53-65 | 74-91 %, by 4 % 2-13 | 9-25 %. Of 3,000 drawn scenes, which look much alike, 1.4 | 2.3 % are dropped
# for another scene (a star for a cross of its colour at its place); noise pictures are at least 14 bits apart.
DISTANCE = 4


@dataclass(frozen=True)
class Found:
    """What came of all samples, in the order of the directories, their shards and keys."""

    left_out: np.ndarray  # bool: dropped by another tool already
    by: np.ndarray  # int64: the kept sample; -1: kept itself
    distance: np.ndarray  # uint8: bits that differ
    exact: np.ndarray  # bool: by has the same bytes


def find_duplicates(parts: list[Hashes], left_out: np.ndarray, distance: int | None = DISTANCE) -> Found:
    """Over all samples of `parts`; `distance` None: equal bytes only. Takes 100 bytes per sample
    beside the hashes, and for several directories once more what those take."""
    total = len(left_out)
    place = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.lexsort((np.arange(total), -_joined(parts, "pixels"), place))
    order = order[(_joined(parts, "pictures") & ~left_out)[order]]
    by, bits = np.full(total, -1, np.int64), np.zeros(total, np.uint8)
    first = order[_first_equal(_joined(parts, "sha256")[order])]
    same = first != order
    by[order[same]] = first[same]
    if distance is not None:
        alive = order[~same & _joined(parts, "usable")[order]]
        thumbnails = _joined(parts, "thumbnails")

        def alike(one: np.ndarray, other: np.ndarray) -> np.ndarray:
            return look_alike(thumbnails[alive[one]], thumbnails[alive[other]])

        near = keep_first(_joined(parts, "phash")[alive], distance, alike)
        gone = near.by >= 0
        by[alive[gone]], bits[alive[gone]] = alive[near.by[gone]], near.distance[gone]
    exact = np.zeros(total, bool)
    exact[order[same]] = True
    # What had equal bytes with a sample that is near to a third goes for the sake of the third.
    again = np.flatnonzero(exact & (by >= 0) & (by[by] >= 0))
    exact[again], bits[again], by[again] = False, bits[by[again]], by[by[again]]
    return Found(left_out, by, bits, exact)


def _joined(parts: list[Hashes], name: str) -> np.ndarray:
    columns = [getattr(part, name) for part in parts]
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _first_equal(sha256: np.ndarray) -> np.ndarray:
    """For each row of uint64 [N, 2] the first row that equals it."""
    order = np.lexsort((sha256[:, 1], sha256[:, 0]))  # stable: equal rows stay in their order
    ranked = sha256[order]
    new = np.ones(len(order), bool)
    new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    first = np.empty(len(order), np.int64)
    first[order] = order[starts[np.cumsum(new) - 1]] if len(order) else 0
    return first


def dropped_already(part: Hashes) -> np.ndarray:
    """bool [N]: which samples other tools' files in DIR/drops name."""
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
    """Raises ValueError for a directory that is given twice: everything in it would be its own duplicate."""
    twice = [path for path, count in Counter(map(os.path.realpath, directories)).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice; name each directory once")


def _drops(parts: list[Hashes], number: int, found: Found) -> Iterator[Drop]:
    starts = _starts(parts)
    part = parts[number]
    for low, high in zip(part.starts[:-1], part.starts[1:], strict=True):
        here = np.arange(low, high) + starts[number]
        here = here[found.by[here] >= 0]
        names = part.locate(here - starts[number])
        kept = _names(parts, found.by[here])
        for row, (shard, key, _, _), keeper in zip(here.tolist(), names, kept, strict=True):
            if found.exact[row]:
                yield Drop(shard, key, EXACT, keeper)
            else:
                yield Drop(shard, key, NEAR, f"{keeper} distance={found.distance[row]}")


def _starts(parts: list[Hashes]) -> np.ndarray:
    return np.cumsum([0, *(len(part) for part in parts)])


def _names(parts: list[Hashes], rows: np.ndarray) -> list[str]:
    """DIR/shard/key of samples counted through all directories."""
    return [f"{parts[number].directory}/{shard}/{key}" for number, shard, key, _, _ in _located(parts, rows)]


def _located(parts: list[Hashes], rows: np.ndarray) -> list[tuple[int, str, str, int, int]]:
    starts = _starts(parts)
    numbers = np.searchsorted(starts, rows, side="right") - 1
    found: list = [None] * len(rows)
    for number in np.unique(numbers).tolist():
        places = np.flatnonzero(numbers == number)
        for place, names in zip(places.tolist(), parts[number].locate(rows[places] - starts[number]), strict=True):
            found[place] = number, *names
    return found


def write_result(parts: list[Hashes], found: Found, settings: dict) -> list[Step]:
    """DIR/drops/dedup.parquet and DIR/steps/dedup.json for each directory."""
    starts, steps = _starts(parts), []
    for number, part in enumerate(parts):
        counts = write_drops(part.directory / "drops" / f"{NAME}.parquet", _drops(parts, number, found))
        out = int(found.left_out[starts[number] : starts[number + 1]].sum())
        rows = len(part) - out
        step = Step(
            tool="data_tools.dedup",
            rows=rows,
            kept=rows - counts.total(),
            dropped=dict(counts),
            settings=settings | {"dropped_before": out, "cannot_be_decoded": part.damaged},
            inputs=[str(other.directory) for other in parts],
        )
        write_step(part.directory, NAME, step)
        steps.append(step)
    return steps


def _show(parts: list[Hashes], found: Found, path: Path, most: int) -> int:
    """A sheet of the near duplicates, those that differ most first: if they are right, the rest is."""
    near = np.flatnonzero((found.by >= 0) & ~found.exact)
    near = near[np.argsort(-found.distance[near].astype(int), kind="stable")][:most]
    pairs = []
    for (n, shard, key, at, size), (m, shard2, key2, at2, size2), bits in zip(
        _located(parts, near), _located(parts, found.by[near]), found.distance[near].tolist(), strict=True
    ):
        one, other = parts[n].directory / f"{shard}.tar", parts[m].directory / f"{shard2}.tar"
        pairs.append(Pair((one, at, size), (other, at2, size2), f"{shard}/{key} | {shard2}/{key2}: {bits} bits"))
    write_contact_sheet(path, pairs)
    return len(pairs)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("data_tools.dedup", __doc__, "data/cc12m --distance 4 --show pairs.png")
    add_directories(parser)
    parser.add_argument(
        "--distance", type=int, default=DISTANCE, metavar="BITS", help="of 64 that may differ (%(default)s)"
    )
    parser.add_argument("--exact-only", action="store_true", help="drop equal bytes only")
    parser.add_argument("--show", type=Path, metavar="PNG", help="also draw the near duplicates that differ most")
    add_workers(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), left="shards that were hashed stay so, the same command goes on from there")


def _run(args: argparse.Namespace) -> None:
    check_distance(args.distance)
    check_directories(args.directories)
    if args.show is not None and args.show.suffix.lower() != ".png":
        raise ValueError(f"--show={args.show} is wrong because a PNG is written; use {args.show.with_suffix('.png')}")
    for directory in args.directories:
        complete_shards(directory)  # a wrong name is told before hours of hashing
    parts = [hash_shards(directory, args.workers) for directory in args.directories]
    begun = time.perf_counter()
    left_out = np.concatenate([dropped_already(part) for part in parts])
    distance = None if args.exact_only else args.distance
    found = find_duplicates(parts, left_out, distance)
    steps = write_result(parts, found, {"distance": distance})
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
            print(f"{part.directory}: {before:,} samples that other files in drops/ name took no part")
    print(f"compared in {time.perf_counter() - begun:.1f} s; drops/{NAME}.parquet and steps/{NAME}.json are written")
    if args.show is not None:
        print(f"{args.show}: {_show(parts, found, args.show, 48)} pairs")


def check_distance(distance: int) -> None:
    if not 0 <= distance <= 16:
        raise ValueError(f"--distance={distance} is wrong because above 16 of 64 bits anything is alike; use 0 to 16")


if __name__ == "__main__":
    sys.exit(main())
