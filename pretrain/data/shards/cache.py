"""Remote shards: fetched through webdataset's `gopen` into a bounded directory that a node's processes share.

A finished file is there under its name or not at all: it is written as .NAME.writing, fsynced, renamed. Whoever holds
the lock on .NAME.writing downloads; the others wait and then find the file. The kernel drops the locks of a process
that dies, so what it leaves behind is taken over or swept away.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from pretrain.files import WRITING, beside, move

log = logging.getLogger(__name__)

GIB = 2**30
_CHUNK = 2**20
# Tries of one download, and the pause after the first in seconds; each further pause is four times as long.
ATTEMPTS, PAUSE_S = 3, 1.0
# Evicting what was read this recently means that the cache holds less than what is being read.
_HOT_S = 60.0
_GROWING = (WRITING, ".tmp")  # .tmp: of an earlier version


class ShardError(ValueError):
    """A shard that cannot be read at all; its text names the shard and the way out."""


def is_remote(url: str) -> bool:
    return url.startswith("pipe:") or re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) is not None


def shown(url: str) -> str:
    """A URL for messages: without user, password and query, which may be secrets."""
    if url.startswith("pipe:") or not is_remote(url):
        return url
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def fetch(url: str, limit: int) -> bytes:
    """A small remote file. ShardError if it cannot be read or has more than `limit` bytes."""
    data = b"".join(_chunks(url))
    if len(data) > limit:
        raise ShardError(f"{shown(url)} has more than {limit} bytes, so it is not what was asked for; check the URL")
    return data


class ShardCache:
    """Files of `directory` that hold remote shards, at most `gib` GiB besides downloads in flight: the least recently
    used go first. Any number of processes may share the directory, if it is on a disk that has flock."""

    def __init__(self, directory: str | Path, gib: float):
        self.directory, self.limit = Path(directory).expanduser(), int(gib * GIB)
        if self.limit <= 0:
            raise ValueError(f"loading.cache_gib={gib} leaves no room for any shard; use a number above 0")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._warned = False

    def open(self, url: str, size: int | None = None, stamp: str = "") -> int:
        """A descriptor of the local copy, which the caller closes. It stays readable when the copy is evicted.

        `size`: what the file must have, in bytes; None: unknown. `stamp`: files of other stamps are other files.
        ShardError if it cannot be fetched whole, OSError if the cache's own disk fails.
        """
        path = self._path(url, f"{stamp} {size}")
        if size is not None and size > self.limit:
            raise ValueError(
                f"loading.cache_gib={self.limit / GIB:g} is smaller than the one shard {shown(url)} of "
                f"{size / GIB:.3g} GiB; use a larger cache"
            )
        while True:
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._download(url, path, size)
                continue
            if size is None or os.fstat(handle).st_size == size:
                os.utime(handle)  # the clock of the eviction: access times are often switched off
                return handle
            os.close(handle)
            path.unlink(missing_ok=True)  # the disk lost a part of it

    def discard(self, url: str, size: int | None = None, stamp: str = "") -> None:
        self._path(url, f"{stamp} {size}").unlink(missing_ok=True)

    def _path(self, url: str, stamp: str) -> Path:
        return self.directory / (hashlib.sha256(f"{stamp} {url}".encode()).hexdigest()[:40] + ".shard")

    def _download(self, url: str, path: Path, size: int | None) -> None:
        temporary = beside(path)
        with _locked(temporary) as file:
            if path.exists():  # somebody else was faster
                temporary.unlink()
                return
            try:
                self._reserve(file, temporary, size or 0)
                _copy(url, file, size)
                file.flush()
                move(temporary, path)
            except BaseException as error:
                temporary.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    text = f"no space left for {shown(url)}; free some or lower loading.cache_gib"
                    raise OSError(error.errno, text, str(self.directory)) from None
                raise

    def _reserve(self, file: BinaryIO, temporary: Path, size: int) -> None:
        """Evicts until `size` bytes fit, and claims them at once by the length of the temporary file."""
        with _locked(self.directory / "lock"):
            kept, used = [], 0
            for entry in os.scandir(self.directory):
                try:
                    if entry.name.endswith(".shard"):
                        kept.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
                        used += entry.stat().st_size
                    elif entry.name.endswith(_GROWING) and entry.name != temporary.name and not _swept(entry.path):
                        used += entry.stat().st_size
                except FileNotFoundError:
                    continue
            for last_use, length, path in sorted(kept):
                if used + size <= self.limit:
                    break
                self._warn_if_hot(last_use)
                Path(path).unlink(missing_ok=True)
                used -= length
            file.truncate(size)

    def _warn_if_hot(self, last_use: float) -> None:
        if not self._warned and time.time() - last_use < _HOT_S:
            self._warned = True
            log.warning(
                "loading.cache_gib=%g is too small: shards are evicted within %.0f s of their last use and will be "
                "fetched again; raise it, or lower loading.streams or loading.block_shards",
                self.limit / GIB,
                _HOT_S,
            )


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, made if need be and locked against every other process and thread."""
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")  # noqa: SIM115, closed below
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                current = False
            if current:  # else it was renamed or removed while this process waited
                yield file
                return
        finally:
            file.close()


def _swept(path: str) -> bool:
    """Removes a temporary file whose owner is dead: nobody holds its lock."""
    with open(path, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        Path(path).unlink(missing_ok=True)
        return True


def _copy(url: str, file: BinaryIO, size: int | None) -> None:
    """The whole of `url` into `file`, in ATTEMPTS tries; exactly `size` bytes if that is known."""
    for attempt in range(ATTEMPTS):
        done = 0
        file.seek(0)
        try:
            for chunk in _chunks(url):
                file.write(chunk)
                done += len(chunk)
                if size is not None and done > size:
                    break
            if size is None or done == size:
                file.truncate(done)
                return
            more = "more" if done > size else done
            raise ShardError(
                f"{shown(url)} has {more} bytes where its manifest says {size}: it was replaced after indexing, or the "
                "transfer was cut off; if it is replaced, run python -m data_tools.index again where it lives"
            )
        except ShardError as error:
            if attempt == ATTEMPTS - 1:
                raise
            log.warning("try %d of %d failed: %s", attempt + 1, ATTEMPTS, error)
            time.sleep(PAUSE_S * 4**attempt)


def _chunks(url: str) -> Iterator[bytes]:
    from webdataset.gopen import gopen, gopen_schemes

    scheme = url.partition(":")[0].lower()
    if scheme != "pipe" and "'" in url:  # webdataset 0.2 hands URLs to a shell between such quotes
        raise ShardError(f"the URL {shown(url)} holds a quote character; write it as %27")
    if scheme == "s3" and "s3" not in gopen_schemes:  # no version of webdataset has it built in
        url = f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    try:
        with gopen(url, "rb") as stream:
            while chunk := stream.read(_CHUNK):
                yield chunk
    except (OSError, ValueError, AssertionError) as error:
        raise ShardError(
            f"{shown(url)} cannot be fetched ({error}); check the URL, the credentials and that the command-line tool "
            "for it (curl, aws, gsutil) is installed"
        ) from None
