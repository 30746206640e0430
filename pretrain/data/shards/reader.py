"""Reading one sample by its number from shards as img2dataset writes them.

A directory holds 00000.tar, 00001.tar, ... with members KEY.jpg|jpeg|png|webp, KEY.txt, KEY.json. `data_tools.index`
adds `manifest.json` (manifest.py) and an `00000.idx` for each (tar_index.py), so that a sample costs one `pread` per
member and nothing is unpacked. Remote shards go through a local cache (cache.py).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from pretrain.data.shards.cache import ShardCache, ShardError, is_remote, shown
from pretrain.data.shards.manifest import Manifest, Shard, load_manifest
from pretrain.data.shards.open_files import Descriptor, OpenFiles
from pretrain.data.shards.tar_index import EXTENSIONS, IMAGE_EXTENSIONS, Member, ShardIndex, index_shard

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

# Far above any picture or caption that is of use; a larger member is a bad sample, not a reason to run out of memory.
MAX_IMAGE_BYTES, MAX_TEXT_BYTES = 256 * 2**20, 16 * 2**20


class BadSample(ValueError):
    """One sample that cannot be used; its text names it and says why."""


class _Open(NamedTuple):
    lines: ShardIndex
    file: Descriptor | None  # None: a remote shard, whose local copy may be evicted, so it is opened for each read


class ShardReader:
    """Reads samples by (shard, sample). One per process and thread; it may be forked or pickled.

    ShardError: the shard is missing, was replaced after indexing, is cut off, or cannot be fetched. BadSample: a
    member is too large. Remote shards need `cache_dir`, see `ShardCache`.
    """

    def __init__(self, manifest: Manifest, cache_dir: str | Path | None = None, cache_gib: float = 50.0):
        self.manifest = manifest
        self._open = OpenFiles[int, _Open]()
        self._lost: dict[int, str] = {}  # remote shards that failed every try, so that each is tried once only
        self._cache: ShardCache | None = None
        remote = next((shard.url for shard in manifest.shards if is_remote(shard.url)), None)
        if remote is not None:
            if cache_dir is None:
                raise ValueError(
                    f"loading.cache_dir is not set, but {shown(remote)} is remote; set it to a directory on a disk of "
                    "each node"
                )
            self._cache = ShardCache(cache_dir, cache_gib)

    def read(self, shard: int, sample: int, wanted: Collection[str] = EXTENSIONS) -> dict[str, bytes]:
        """Extension -> content of the sample's members, of those in `wanted`; "__key__" -> its key in UTF-8."""
        entry = self.manifest.shards[shard]
        opened = self._opened(shard)
        members = opened.lines.members(sample)
        content = {"__key__": opened.lines.key(sample).encode()}
        if opened.file is not None:
            fd, ours = opened.file.fd, None
        else:
            assert self._cache is not None
            fd = ours = self._fetched(shard)
        try:
            for member in members:
                if member.extension in wanted:
                    content[member.extension] = _read_member(fd, member, entry)
        finally:
            if ours is not None:
                os.close(ours)
        return content

    def fetch(self, shard: int) -> None:
        """Makes sure that a remote shard is in the cache; for a loader that looks ahead. Local: checks it only."""
        if self._opened(shard).file is None:
            os.close(self._fetched(shard))

    def index(self, shard: int) -> ShardIndex:
        return self._opened(shard).lines

    def open_beside(self, shard: int, ending: str, stamp: str) -> int:
        """A descriptor, which the caller closes, of the file NNNNN.ENDING beside NNNNN.tar. `stamp`: a remote file with
        another one is another file."""
        entry = self.manifest.shards[shard]
        url = entry.beside(f"{entry.name.removesuffix('.tar')}.{ending}")
        if is_remote(url):
            return self._fetched(shard, url, None, f"{entry.bytes} {stamp}")
        try:
            return os.open(url, os.O_RDONLY)
        except OSError as error:
            raise ShardError(f"{url} cannot be read ({error.strerror}); restore it, or make it again") from None

    def close(self) -> None:
        self._open.clear()

    def _opened(self, shard: int) -> _Open:
        return self._open.opened(shard, lambda: self._open_shard(shard))

    def _open_shard(self, shard: int) -> _Open:
        entry = self.manifest.shards[shard]
        opened = _Open(self._remote_index(shard), None) if is_remote(entry.url) else self._open_local(entry)
        if opened.lines.samples != entry.samples:
            raise ShardError(
                f"the index of {shown(entry.url)} holds {opened.lines.samples} samples, its manifest {entry.samples}; "
                "run python -m data_tools.index again"
            )
        return opened

    def _open_local(self, entry: Shard) -> _Open:
        try:
            file = Descriptor(entry.url)
            size, data = os.fstat(file.fd).st_size, Path(entry.index_url).read_bytes()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # no fault of the shard: give back ours and try once more
                if not self._open:
                    raise
                self._open.clear()
                return self._open_local(entry)
            text = f"{error.filename or entry.url} cannot be read ({error.strerror})"
            raise ShardError(f"{text}; restore it, or run python -m data_tools.index again without it") from None
        if size != entry.bytes:
            raise ShardError(
                f"{entry.url} has {size} bytes, its manifest says {entry.bytes}: it was replaced or cut off after "
                "indexing; run python -m data_tools.index again"
            )
        return _Open(ShardIndex(data, entry.index_url), file)

    def _remote_index(self, shard: int) -> ShardIndex:
        entry, stamp = self.manifest.shards[shard], f"{self.manifest.shards[shard].bytes}"
        fd = self._fetched(shard, entry.index_url, None, stamp)
        with open(fd, "rb") as file:
            data = file.read()
        try:
            return ShardIndex(data, shown(entry.index_url))
        except ShardError:
            assert self._cache is not None
            self._cache.discard(entry.index_url, None, stamp)
            raise

    def _fetched(self, shard: int, url: str = "", size: int | None = None, stamp: str = "") -> int:
        assert self._cache is not None
        if shard in self._lost:
            raise ShardError(self._lost[shard])
        entry = self.manifest.shards[shard]
        try:
            if url:
                return self._cache.open(url, size, stamp)
            return self._cache.open(entry.url, entry.bytes)
        except ShardError as error:
            self._lost[shard] = str(error)
            raise


def _read_member(fd: int, member: Member, entry: Shard) -> bytes:
    limit = MAX_IMAGE_BYTES if member.extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
    if member.size > limit:
        raise BadSample(f"{member.name} in {shown(entry.url)} has {member.size} bytes; at most {limit} are read")
    try:
        data = os.pread(fd, member.size, member.offset)
    except OSError as error:
        raise ShardError(f"{shown(entry.url)} cannot be read at byte {member.offset} ({error.strerror})") from None
    if len(data) != member.size:
        raise ShardError(
            f"{shown(entry.url)} ends before {member.name}, which its index puts at byte {member.offset}; run python "
            "-m data_tools.index again"
        )
    return data
