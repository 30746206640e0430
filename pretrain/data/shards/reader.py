"""Reads one sample by its number, from shards as img2dataset writes them.

A directory contains 00000.tar, 00001.tar, ... with members KEY.jpg|jpeg|png|webp, ..., KEY.txt, KEY.json.
`data_tools.index` adds `manifest.json` (manifest.py) and a `00000.idx` per shard (tar_index.py), so that a sample costs
one `pread` per member and nothing is unpacked. Remote shards go through a local cache (cache.py).
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pretrain.data.shards.cache import ShardCache, ShardError, is_remote, redact
from pretrain.data.shards.manifest import Manifest, Shard, load_manifest
from pretrain.data.shards.open_files import Descriptor, OpenFiles
from pretrain.data.shards.tar_index import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    MAX_INDEX_BYTES,
    Member,
    ShardIndex,
    index_shard,
)
from pretrain.files import regular_descriptor
from pretrain.json_files import read_bytes

__all__ = [
    "EXTENSIONS",
    "IMAGE_EXTENSIONS",
    "BadSample",
    "Manifest",
    "Shard",
    "ShardError",
    "ShardIndex",
    "ShardReader",
    "index_shard",
    "load_manifest",
]

# Far above any useful picture or caption; a larger member is a bad sample, so that it cannot exhaust memory.
MAX_IMAGE_BYTES, MAX_TEXT_BYTES = 256 * 2**20, 16 * 2**20
MOST_CAPTIONS = 1000  # of a picture: a hostile JSON holds millions, each of which takes a row of ids
# How much `check_some` reads: well under a second from a local disk.
CHECKED_SHARDS, CHECKED_SAMPLES = 16, 8


class BadSample(ValueError):
    """A sample that cannot be used; the message says why."""


class _Open(NamedTuple):
    lines: ShardIndex
    file: Descriptor | None  # None: a remote shard; its local copy may be evicted, so each read opens it


class ShardReader:
    """Reads samples by (shard, sample). One per process and thread; it may be forked or pickled.

    It returns exactly the bytes that were indexed, or raises ShardError: the shard is missing, was changed after
    indexing, is truncated, or cannot be fetched; BadSample: a member is too large. Remote shards need `cache_dir`, see
    `ShardCache`.
    """

    def __init__(self, manifest: Manifest, cache_dir: str | Path | None = None, cache_gib: float = 50.0):
        self.manifest = manifest
        self._cache_at = cache_dir, cache_gib
        self._open = OpenFiles[int, _Open]()
        self._failures: dict[int, ShardError] = {}  # of remote shards, so that each is tried only once
        self.cache: ShardCache | None = None  # None: no shard is remote
        remote = next((shard.url for shard in manifest.shards if is_remote(shard.url)), None)
        if remote is not None:
            if cache_dir is None:
                raise ValueError(
                    f"loading.cache_dir is not set, but {redact(remote)} is remote; set it to a directory on a local "
                    "disk of each node"
                )
            self.cache = ShardCache(cache_dir, cache_gib)

    def read(self, shard: int, sample: int, wanted: Collection[str] = EXTENSIONS) -> dict[str, bytes]:
        """Extension -> content of the sample's members in `wanted`; "__key__" -> its key in UTF-8."""
        entry = self.manifest.shards[shard]
        shard_file = self._shard_file(shard)
        members = shard_file.lines.members(sample)
        content = {"__key__": shard_file.lines.key(sample).encode()}
        if shard_file.file is not None:
            fd, temporary = shard_file.file.fd, None
        else:
            assert self.cache is not None
            fd = temporary = self._open_remote(shard)
        try:
            for member in members:
                if member.extension in wanted:
                    content[member.extension] = _read_member(fd, member, entry)
        finally:
            if temporary is not None:
                os.close(temporary)
        return content

    def again(self) -> ShardReader:
        """A new reader of the same shards, for another thread."""
        return ShardReader(self.manifest, *self._cache_at)

    def fetch(self, shard: int) -> None:
        """Makes sure that a remote shard is in the cache, for prefetching. Only checks a local one."""
        if self._shard_file(shard).file is None:
            os.close(self._open_remote(shard))

    def check_some(self) -> None:
        """Reads a few samples of a few local shards, spread over all of them and the same on every rank, so that most
        changes since indexing stop a run at its start and not later. Raises ShardError."""
        local = [n for n, shard in enumerate(self.manifest.shards) if shard.samples and not is_remote(shard.url)]
        for shard in _spread(local, CHECKED_SHARDS):
            for sample in _spread(range(self.manifest.shards[shard].samples), CHECKED_SAMPLES):
                with suppress(BadSample):
                    self.read(shard, sample)
        self.close()

    def index(self, shard: int) -> ShardIndex:
        return self._shard_file(shard).lines

    def open_beside(self, shard: int, ending: str, stamp: str) -> int:
        """A descriptor, which the caller closes, of the file NNNNN.ENDING beside NNNNN.tar. `stamp`: the cache has a
        separate copy of a remote file for each stamp."""
        entry = self.manifest.shards[shard]
        url = entry.beside(f"{entry.name.removesuffix('.tar')}.{ending}")
        if is_remote(url):
            return self._open_remote(shard, url, None, f"{entry.bytes} {stamp}")
        try:
            return regular_descriptor(url)
        except OSError as error:
            raise ShardError(f"cannot read {url} ({error.strerror}); restore it, or make it again") from None
        except ValueError as error:
            raise ShardError(f"{error}; restore it, or make it again") from None

    def close(self) -> None:
        self._open.clear()

    def _shard_file(self, shard: int) -> _Open:
        return self._open.get_or_open(shard, lambda: self._open_shard(shard))

    def _open_shard(self, shard: int) -> _Open:
        entry = self.manifest.shards[shard]
        shard_file = _Open(self._remote_index(shard), None) if is_remote(entry.url) else self._open_local(entry)
        if shard_file.lines.samples != entry.samples:
            raise ShardError(
                f"the index of {redact(entry.url)} has {shard_file.lines.samples} samples, its manifest has "
                f"{entry.samples}; run python -m data_tools.index again"
            )
        return shard_file

    def _open_local(self, entry: Shard) -> _Open:
        try:
            file = Descriptor(entry.url)
            size, data = os.fstat(file.fd).st_size, read_bytes(entry.index_url, MAX_INDEX_BYTES)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # not the shard's fault: close our files and retry
                if not self._open:
                    raise
                self._open.clear()
                return self._open_local(entry)
            text = f"cannot read {error.filename or entry.url} ({error.strerror})"
            raise ShardError(f"{text}; restore it, or run python -m data_tools.index again without it") from None
        except ValueError as error:
            raise ShardError(f"{error}; run python -m data_tools.index again") from None
        if size != entry.bytes:
            raise ShardError(
                f"{entry.url} has {size} bytes but its manifest says {entry.bytes}: it was replaced or truncated after "
                "indexing; run python -m data_tools.index again"
            )
        return _Open(_parse_index(data, entry), file)

    def _remote_index(self, shard: int) -> ShardIndex:
        entry = self.manifest.shards[shard]
        stamp = f"{entry.bytes} {entry.index_sha256}".rstrip()
        fd = self._open_remote(shard, entry.index_url, None, stamp)
        with open(fd, "rb") as file:
            data = file.read()
        try:
            return _parse_index(data, entry)
        except ShardError:
            assert self.cache is not None
            self.cache.discard(entry.index_url, None, stamp)
            raise

    def _open_remote(self, shard: int, url: str = "", size: int | None = None, stamp: str = "") -> int:
        assert self.cache is not None
        if shard in self._failures:
            raise type(self._failures[shard])(str(self._failures[shard]))
        entry = self.manifest.shards[shard]
        try:
            if url:
                return self.cache.open(url, size, stamp)
            return self.cache.open(entry.url, entry.bytes, entry.sha256)
        except ShardError as error:
            self._failures[shard] = error
            raise


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    last = len(items) - 1
    return [items[place] for place in sorted({last * n // (most - 1) for n in range(most)})] if items else []


def _parse_index(data: bytes, entry: Shard) -> ShardIndex:
    if entry.index_sha256 and hashlib.sha256(data).hexdigest() != entry.index_sha256:
        raise ShardError(
            f"{redact(entry.index_url)} is not the index that the manifest names: it was changed, or belongs to "
            "another state of the shard; run python -m data_tools.index again"
        )
    return ShardIndex(data, redact(entry.index_url))


def _read_member(fd: int, member: Member, entry: Shard) -> bytes:
    limit = MAX_IMAGE_BYTES if member.extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
    if member.size > limit:
        raise BadSample(f"{member.name} in {redact(entry.url)} has {member.size} bytes; the limit is {limit}")
    try:
        data = os.pread(fd, member.size, member.offset)
    except OSError as error:
        raise ShardError(f"cannot read {redact(entry.url)} at byte {member.offset} ({error.strerror})") from None
    if len(data) != member.size:
        raise ShardError(
            f"{redact(entry.url)} ends before {member.name}, which is at byte {member.offset} by its index; run "
            "python -m data_tools.index again"
        )
    if member.crc32 is not None and zlib.crc32(data) != member.crc32:
        raise ShardError(
            f"{redact(entry.url)} was changed after indexing or is damaged: {member.name}, at byte {member.offset}, is "
            "not what it was; put the shard back as it was, or run python -m data_tools.index again"
        )
    return data
