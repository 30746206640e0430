"""The samples of a shard and where their members lie; and tables about them that are made once for each tar."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.data.shards.reader import MAX_TEXT_BYTES
from pretrain.data.shards.tar_index import IMAGE_EXTENSIONS, Member, index_shard
from pretrain.files import write_file


class Sample(NamedTuple):
    key: str  # fit to print: bytes that are not UTF-8 are written as \xNN
    members: dict[str, Member]  # by extension

    @property
    def picture(self) -> Member | None:
        return next((self.members[name] for name in IMAGE_EXTENSIONS if name in self.members), None)

    def text(self, file: BinaryIO) -> str | None:
        """The .txt, read from its tar. None where there is none, an empty one, or one that is too long to be read."""
        member = self.members.get("txt")
        if member is None or not 0 < member.size <= MAX_TEXT_BYTES:
            return None
        file.seek(member.offset)
        return file.read(member.size).decode(errors="replace")


def samples_of(tar: Path) -> Iterator[Sample]:
    """As training finds them, by key: a tar follows the order of its download. Reads headers alone and takes some 300
    bytes a sample. ShardError for a tar that is cut off or damaged."""
    index = index_shard(tar)
    for key, number in sorted((index.key(number), number) for number in range(index.samples)):
        yield Sample(key, {member.extension: member for member in index.members(number)})


def make_table(
    tar: Path, file: Path, schema: pa.Schema, version: int, rows: Callable[[Path], Iterable[dict]]
) -> pa.Table | None:
    """Writes `rows(tar)` to a parquet file. -> None where that is done: for this version, and this size and time of the
    tar."""
    state = os.stat(tar)
    stamp = json.dumps({"version": version, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}).encode()
    try:
        found = pq.read_schema(file)
        if found.equals(schema) and (found.metadata or {}).get(b"shard") == stamp:
            return None
    except (OSError, pa.ArrowException):  # not there, or damaged: it is written again
        pass
    table = pa.Table.from_pylist(list(rows(tar)), schema=schema).replace_schema_metadata({b"shard": stamp})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_file(file, sink.getvalue().to_pybytes())
    return table
