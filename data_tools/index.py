"""Indexes directories of shards: one manifest.json per directory and one .idx per tar, which training reads.

    python -m data_tools.index data/cc12m data/laion --workers 8

A shard is read once, as a whole, for the checksums that training compares with whatever it reads. Shards whose index is
up to date are not read again, so the tool may run after every download. Where tars have the _stats.json of img2dataset,
those of the same numbering without one are skipped: they are the rest of a killed download. Files that are skipped and
members that belong to no sample are counted, each with the reason. Where the directory cannot be written to, index one
of links to its files.
"""

from __future__ import annotations

import argparse
import sys

from pretrain.command import add_directories, add_workers, make_parser, run
from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.left_out import in_words
from pretrain.data.shards.manifest import MANIFEST
from pretrain.visible import say


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("data_tools.index", __doc__, "data/cc12m --workers 8")
    add_directories(parser)
    add_workers(parser)
    parser.add_argument("--skip-broken", action="store_true", help="skip truncated and damaged tars")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="finished indexes stay; run the same command to continue")


def _run(args: argparse.Namespace) -> None:
    for directory in args.directories:
        result = index_directory(directory, args.workers, args.skip_broken)
        manifest = result.manifest
        for line in result.skipped:
            say(f"skipped: {line}", error=True)
        for line in in_words(result.left_out).values():
            say(f"left out: {line}", error=True)
        if result.left_out:
            print(f"python -m data_tools.verify {directory} says where they are", file=sys.stderr)
        gib = sum(shard.bytes for shard in manifest.shards) / 2**30
        print(
            f"{directory / MANIFEST}: {len(manifest.shards)} shards ({result.scanned} read, the rest up to date), "
            f"{manifest.samples:,} samples, {gib:.3g} GiB"
        )


if __name__ == "__main__":
    sys.exit(main())
