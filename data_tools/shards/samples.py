"""The samples of a shard and the places of their members, and tables about them that are made once per tar."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.lists.reading import CAPTIONS
from pretrain.data.shards.reader import MAX_TEXT_BYTES, MOST_CAPTIONS
from pretrain.data.shards.tar_index import IMAGE_EXTENSIONS, Member, index_shard
from pretrain.files import write_file
from pretrain.json_files import parse_json


class Sample(NamedTuple):
    key: str  # printable: bytes that are not UTF-8 become \xNN
    members: dict[str, Member]  # by extension

    @property
    def picture(self) -> Member | None:
        return next((self.members[name] for name in IMAGE_EXTENSIONS if name in self.members), None)

    def text(self, file: BinaryIO) -> str | None:
        """The .txt, read from the tar `file`. None if it is missing, empty, or too long."""
        member = self.members.get("txt")
        if member is None or not 0 < member.size <= MAX_TEXT_BYTES:
            return None
        file.seek(member.offset)
        return file.read(member.size).decode(errors="replace")

    def texts(self, file: BinaryIO) -> list[str]:
        """Each text that a source may read of the sample, once: its .txt, and MOST_CAPTIONS of its .json's
        `captions`."""
        texts = [self.text(file), *self._captions(file)]
        return list(dict.fromkeys(text for text in texts if text is not None))

    def _captions(self, file: BinaryIO) -> list[str]:
        member = self.members.get("json")
        if member is None or not 0 < member.size <= MAX_TEXT_BYTES:
            return []
        file.seek(member.offset)
        try:
            content = parse_json(file.read(member.size))
        except ValueError:
            return []
        captions = content.get(CAPTIONS) if isinstance(content, dict) else None
        if not isinstance(captions, list):
            return []
        return [text for text in captions[:MOST_CAPTIONS] if isinstance(text, str)]


def samples_of(tar: Path) -> Iterator[Sample]:
    """The samples that training reads, but sorted by key, because a tar has the order of its download. Reads only
    headers, and takes about 300 bytes per sample. ShardError for a tar that is truncated or damaged."""
    index = index_shard(tar)
    for key, number in sorted((index.key(number), number) for number in range(index.samples)):
        yield Sample(key, {member.extension: member for member in index.members(number)})


def make_table(
    tar: Path, file: Path, schema: pa.Schema, version: int, rows: Callable[[Path], Iterable[dict]]
) -> pa.Table | None:
    """Writes `rows(tar)` to a parquet file. -> the table; None if the file is up to date, that is made by this version
    from a tar of this size and time."""
    state = os.stat(tar)
    stamp = json.dumps({"version": version, "bytes": state.st_size, "mtime_ns": state.st_mtime_ns}).encode()
    try:
        existing = pq.read_schema(file)
        if existing.equals(schema) and (existing.metadata or {}).get(b"shard") == stamp:
            return None
    except (OSError, pa.ArrowException):  # missing or damaged
        pass
    table = pa.Table.from_pylist(list(rows(tar)), schema=schema).replace_schema_metadata({b"shard": stamp})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_file(file, sink.getvalue().to_pybytes())
    return table
