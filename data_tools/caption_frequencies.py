"""How rare each run of one to four words is in captions: CIDEr's weights, for training that rewards captions by CIDEr.

    python -m data_tools.caption_frequencies data/coco/train --out data/coco/frequencies.json

Counts, in shards of pictures with captions (all `captions` of a sample's JSON, else its txt), how many pictures have
the run in a caption. The source RewardShards(frequencies=...) reads the file, for the objective SelfCritical. Runs that
only one picture has are left out: they count like those that none has.
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
    """The captions of each picture that has any."""
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
    frequencies = Frequencies.of(references(args.directories))
    if frequencies.pictures < 2:
        places = ", ".join(map(str, args.directories))
        raise ValueError(f"{places}: {frequencies.pictures} pictures have captions; two are the least, so give more")
    frequencies.write(args.out)
    print(f"{args.out}: {len(frequencies.grams):,} runs of words in the captions of {frequencies.pictures:,} pictures")


if __name__ == "__main__":
    sys.exit(main())
