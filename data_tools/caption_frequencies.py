"""How rare one to four words are together in captions: the weights of CIDEr's words when captions are rewarded by it.

    python -m data_tools.caption_frequencies data/coco/train --out data/coco/frequencies.json

Counts in shards of pictures with captions (all `captions` of a sample's JSON, else its txt) with how many pictures each
stands. The source RewardShards(frequencies=...) reads the file, for the objective SelfCritical. Words that stand
together with a single picture are left out: they count as those that stand with none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from pretrain.command import add_directories, make_parser, run
from pretrain.data.cider import Frequencies
from pretrain.data.labelled import references_of
from pretrain.data.shards.manifest import load_manifest
from pretrain.data.shards.reader import BadSample, ShardReader


def references(directories: list[Path]) -> Iterator[tuple[str, ...]]:
    """Of each picture that has any."""
    for directory in directories:
        reader = ShardReader(load_manifest(str(directory)))
        places = [(shard, n) for shard, samples in enumerate(reader.manifest.counts) for n in range(samples)]
        for shard, number in tqdm(places, desc=str(directory), unit=" pictures", disable=None):
            try:
                yield references_of(reader.read(shard, number, ("json", "txt")))
            except BadSample:
                continue


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("data_tools.caption_frequencies", __doc__, "data/coco/train --out data/coco/frequencies.json")
    add_directories(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the counts, as JSON")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="nothing was written")


def _run(args: argparse.Namespace) -> None:
    counted = Frequencies.of(references(args.directories))
    if counted.pictures < 2:
        places = ", ".join(map(str, args.directories))
        raise ValueError(f"{places}: {counted.pictures} pictures have captions; two are the least, so give more")
    counted.write(args.out)
    print(f"{args.out}: {len(counted.grams):,} grams of the captions of {counted.pictures:,} pictures")


if __name__ == "__main__":
    sys.exit(main())
