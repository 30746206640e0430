"""Binds an index to the content of its shard: a CRC-32 of each member, and a SHA-256 of the whole.

Names and sizes alone do not identify a shard: with other pictures of the same sizes, or the same members in another
order, a run would go on with other data than it began with. The reader checks the CRC-32 of whatever it reads; the
manifest's digest, and `data_tools.verify`, use the SHA-256. Neither is signed: whoever can rewrite the manifest and the
indexes together can give a run any data.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from pretrain.data.shards.cache import ShardError
from pretrain.data.shards.tar_index import ShardIndex

_CHUNK = 2**20


def with_checksums(path: Path, index: ShardIndex) -> tuple[ShardIndex, str]:
    """(`index` with the CRC-32 of each member, the SHA-256 of the shard), from one pass over the shard. ShardError if
    it changed or shrank in the meantime."""
    members = [member for sample in range(index.samples) for member in index.members(sample)]
    sums = [0] * len(members)
    whole = hashlib.sha256()
    with open(path, "rb", buffering=_CHUNK) as file:
        before = os.fstat(file.fileno())
        for number in sorted(range(len(members)), key=lambda number: members[number].offset):
            _take(file, members[number].offset - file.tell(), whole.update)

            def add(data: bytes, number: int = number) -> None:
                whole.update(data)
                sums[number] = zlib.crc32(data, sums[number])

            _take(file, members[number].size, add)
        _take(file, before.st_size - file.tell(), whole.update)
        after = os.fstat(file.fileno())
        if file.read(1) or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise ShardError(f"{path} changed while it was read; wait until the program that writes it is done")
    return index.with_sums(sums), whole.hexdigest()


def _take(file: BinaryIO, length: int, use: Callable[[bytes], None]) -> None:
    """Passes the next `length` bytes to `use`, in chunks. ShardError if the file ends before."""
    while length > 0:
        data = file.read(min(length, _CHUNK))
        if not data:
            raise ShardError(f"{file.name} ends at byte {file.tell()}: it became shorter while it was read")
        use(data)
        length -= len(data)
