"""Remote shards: fetched (transfer.py) into a bounded directory that a node's processes share.

A file under its final name is complete: it is written as .NAME.writing, synced and then renamed. The process that has
the lock on .NAME.writing downloads; the others wait for it and then open the file. The kernel releases the locks of a
process that dies, so its unfinished files are taken over or removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pretrain.data.pulse import beat
from pretrain.data.shards.transfer import Refusal, ShardError, Unreachable, chunks, is_remote, redact
from pretrain.files import WRITING, beside, move

__all__ = ["ShardCache", "ShardError", "fetch", "is_remote", "redact"]

log = logging.getLogger(__name__)

GIB = 2**30
# Attempts per download, and the pause after the first one in seconds; each further pause is three times as long, up to
# the longest: about four minutes together, after which most of a store's troubles are over.
ATTEMPTS, PAUSE_S, LONGEST_S = 8, 1.0, 60.0
# The most bytes of a file whose size is in no manifest, an index or codes: ten thousand samples take 1 MB and tens of
# MB.
MOST_BYTES = GIB
# Evicting a file that was read this recently means that the cache is smaller than the set of shards in use.
_RECENT_S = 60.0
_LOCK_S = 0.1  # between two attempts at a lock
_GROWING = (WRITING, ".tmp")  # .tmp: of an earlier version
_FAILED = ".failed"  # holds the kind and the message of the last failed download
_DICE = random.SystemRandom()  # for pauses only; it decides nothing about samples


def fetch(url: str, limit: int) -> bytes:
    """A small remote file. ShardError if it cannot be read or has more than `limit` bytes."""
    file = io.BytesIO()
    _copy(url, file, None, limit)
    return file.getvalue()


class ShardCache:
    """Local copies of remote shards in `directory`, at most `gib` GiB besides downloads in progress; the least recently
    used are evicted first. Any number of processes may share the directory if its file system supports flock."""

    def __init__(self, directory: str | Path, gib: float):
        self.directory, self.limit = Path(directory).expanduser(), int(gib * GIB)
        if self.limit <= 0:
            raise ValueError(f"loading.cache_gib={gib} leaves no room for a shard; use a number above 0")
        self.directory.mkdir(parents=True, exist_ok=True)
        self._warned = False

    def open(self, url: str, size: int | None = None, stamp: str = "") -> int:
        """A descriptor of the local copy, which the caller closes. It stays readable when the copy is evicted.

        `size`: what the file must have, in bytes; None: unknown. `stamp`: a URL has a separate copy for each stamp.
        ShardError if it cannot be fetched completely, OSError if the cache's own disk fails.
        """
        path = self._path(url, f"{stamp} {size}")
        if size is not None and size > self.limit:
            raise ValueError(
                f"loading.cache_gib={self.limit / GIB:g} is smaller than a single shard, {redact(url)} of "
                f"{size / GIB:.3g} GiB; use a larger cache"
            )
        while True:
            try:
                handle = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                self._download(url, path, size)
                continue
            if size is None or os.fstat(handle).st_size == size:
                os.utime(handle)  # eviction goes by mtime, because access times are often switched off
                return handle
            os.close(handle)
            path.unlink(missing_ok=True)  # truncated, for example by a full disk or a crash

    def discard(self, url: str, size: int | None = None, stamp: str = "") -> None:
        self._path(url, f"{stamp} {size}").unlink(missing_ok=True)

    def _path(self, url: str, stamp: str) -> Path:
        return self.directory / (hashlib.sha256(f"{stamp} {url}".encode()).hexdigest()[:40] + ".shard")

    def _download(self, url: str, path: Path, size: int | None) -> None:
        temporary, failed, start = beside(path), path.with_suffix(_FAILED), time.time()
        with _locked(temporary) as file:
            if path.exists():  # another process was faster
                temporary.unlink()
                return
            if failure := _failure_since(start, failed):
                temporary.unlink()
                raise failure
            try:
                self._reserve(file, temporary, size or 0)
                _copy(url, file, size)
                file.flush()
                move(temporary, path)
                failed.unlink(missing_ok=True)
            except BaseException as error:
                if isinstance(error, ShardError):
                    with suppress(OSError):
                        failed.write_text(f"{type(error).__name__}\n{error}")
                temporary.unlink(missing_ok=True)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    text = f"no space left for {redact(url)}; free some space or lower loading.cache_gib"
                    raise OSError(error.errno, text, str(self.directory)) from None
                raise

    def _reserve(self, file: BinaryIO, temporary: Path, size: int) -> None:
        """Evicts files until `size` bytes fit, and reserves them at once by extending the temporary file."""
        with _locked(self.directory / "lock"):
            shards, used = [], 0
            for entry in os.scandir(self.directory):
                try:
                    if entry.name.endswith(".shard"):
                        shards.append((entry.stat().st_mtime, entry.stat().st_size, entry.path))
                        used += entry.stat().st_size
                    elif (
                        entry.name.endswith(_GROWING)
                        and entry.name != temporary.name
                        and not _remove_orphan(entry.path)
                    ):
                        used += entry.stat().st_size
                except FileNotFoundError:
                    continue
            for last_use, length, path in sorted(shards):
                if used + size <= self.limit:
                    break
                self._warn_if_recent(last_use)
                Path(path).unlink(missing_ok=True)
                used -= length
            file.truncate(size)

    def _warn_if_recent(self, last_use: float) -> None:
        if not self._warned and time.time() - last_use < _RECENT_S:
            self._warned = True
            log.warning(
                "loading.cache_gib=%g is too small: shards are evicted within %.0f s of their last use and will be "
                "fetched again; raise it, or lower loading.streams or loading.block_shards",
                self.limit / GIB,
                _RECENT_S,
            )


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, created if necessary and locked against all other processes and threads."""
    while True:
        file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")  # noqa: SIM115, closed below
        try:
            while not _lock(file):  # another process downloads it, perhaps for minutes
                beat()
                time.sleep(_LOCK_S)
            try:
                current = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
            except FileNotFoundError:
                current = False
            if current:  # otherwise it was renamed or removed while this process waited
                yield file
                return
        finally:
            file.close()


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _failure_since(start: float, failed: Path) -> ShardError | None:
    """The error with which another process failed to fetch the file while this one waited for it; None if none did.
    Without it many workers would wait one after another for a server that stalls."""
    with suppress(FileNotFoundError):
        if failed.stat().st_mtime > start:
            kind, _, text = failed.read_text().partition("\n")
            return Unreachable(text) if kind == Unreachable.__name__ else ShardError(text)
    return None


def _remove_orphan(path: str) -> bool:
    """Removes a temporary file if no process has locked it, since then its owner is dead -> whether it did."""
    with open(path, "r+b") as file:
        if not _lock(file):
            return False
        Path(path).unlink(missing_ok=True)
        return True


def _copy(url: str, file: BinaryIO, size: int | None, most: int | None = None) -> None:
    """Copies all of `url` into `file`, in up to ATTEMPTS attempts; exactly `size` bytes if that is given, otherwise at
    most `most` (None: MOST_BYTES). Raises Refusal if further attempts would be useless, else Unreachable."""
    most = MOST_BYTES if most is None else most
    for attempt in range(ATTEMPTS):
        try:
            _copy_once(url, file, size, most)
            return
        except Refusal:
            raise
        except ShardError as error:
            if attempt == ATTEMPTS - 1:
                raise Unreachable(f"{error} (attempt {ATTEMPTS} of {ATTEMPTS})") from None
            log.warning("attempt %d of %d failed: %s", attempt + 1, ATTEMPTS, error)
            _pause(attempt)


def _copy_once(url: str, file: BinaryIO, size: int | None, most: int) -> None:
    done = 0
    file.seek(0)
    for chunk in chunks(url):
        done += len(chunk)
        if size is None and done > most:
            raise Refusal(f"{redact(url)} has more than {most} bytes, so it is the wrong file; check the URL")
        file.write(chunk)
        if size is not None and done > size:
            break
    if size is None or done == size:
        file.truncate(done)
        return
    more = "more" if done > size else done
    raise ShardError(
        f"{redact(url)} has {more} bytes but its manifest says {size}: it was replaced after indexing, or the transfer "
        "was interrupted; if it was replaced, run python -m data_tools.index again where it is stored"
    )


def _pause(attempt: int) -> None:
    """Waits as long as the schedule says and a random part more, up to half: if a store fails the workers of a thousand
    nodes at the same moment, they must not all come back at the same moment."""
    left = min(PAUSE_S * 3**attempt, LONGEST_S) * (1 + _DICE.random() / 2)
    while left > 0:
        beat()
        time.sleep(min(left, 1.0))
        left -= 1.0
