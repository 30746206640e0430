"""Tars of any members, and a small source whose contents say where they stand, for tests."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from pretrain.data.shards.reader import ShardReader
from tests.data.shard_files import index_source


def write_tar(path: Path, members: dict[str, bytes] | list, **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            if isinstance(name, tarfile.TarInfo):
                tar.addfile(name)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def numbered_source(directory: Path) -> Path:
    """Three indexed shards of 1, 2 and 3 samples; a sample's members repeat its key."""
    directory.mkdir()
    for shard in range(3):
        members = {}
        for sample in range(shard + 1):
            key = f"{shard:05d}{sample:04d}"
            members |= {f"{key}.jpg": f"picture {key}".encode() * 300, f"{key}.txt": key.encode(), f"{key}.json": b"{}"}
        write_tar(directory / f"{shard:05d}.tar", members)
    return index_source(directory)


def read_all(reader: ShardReader) -> list[dict[str, bytes]]:
    return [reader.read(shard, i) for shard, count in enumerate(reader.manifest.counts) for i in range(count)]
