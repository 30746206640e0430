"""Only one process at a time writes to a directory: a lock file names the process, its node and since when.

The kernel's record lock ensures it, also over NFS and over Lustre mounted with `flock`: it ends with its process, by
kill -9 too, and no forked worker inherits it. Where a file system has no locks, or separate ones for each node (Lustre
with `localflock`), the holder's heartbeat takes its place: the record in the file changes every BEAT_S.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = "lock"
BEAT_S = 5.0
BEATS = 4  # how many beats a holder may miss before it counts as gone
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def try_lock(handle: int, path: Path, lock: Callable[[int, int], object] | None = None) -> bool:
    """Tries to lock the open file at `path` -> whether this process now has the lock. OSError if the file system has no
    locks."""
    try:
        (lock or fcntl.lockf)(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except (BlockingIOError, PermissionError, FileNotFoundError):  # locked, or removed by the process that had it
        return False


def this_process() -> str:
    """The sentence by which a lock's file names its holder."""
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return f"process {os.getpid()} on {socket.gethostname()} since {since}"


class Lock:
    """The lock on a directory, held from its construction until `release` or the end of the process. Raises ValueError,
    naming the holder, if another process has it; OSError if `directory` cannot be written."""

    def __init__(self, directory: Path):
        self.path, self.name = directory / LOCK, this_process()
        directory.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        self._over = threading.Event()
        try:
            self._take(directory)
        except BaseException:
            os.close(self._handle)
            raise
        self._beats = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._beats.start()

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        if not self._over.is_set():
            self._over.set()
            self._beats.join()
            with suppress(OSError):  # the end of the process releases it too
                os.ftruncate(self._handle, 0)
            os.close(self._handle)

    def _take(self, directory: Path) -> None:
        locks = True
        try:
            free = try_lock(self._handle, self.path)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locks, free = False, True
        record = self._record()
        # About a holder on this node the kernel's lock is right, if there are locks, whatever the record says.
        doubtful = record and not (locks and f" on {socket.gethostname()} since " in record)
        if not free or (doubtful and self._alive(record)):
            holder = record.partition(", beat")[0] or "another process"
            raise ValueError(
                f"{directory} is in use: {holder} writes to it ({self.path}); wait for that job or end it, or take "
                "another --run-dir"
            )
        self._write(0)
        if not locks:  # if two processes start at the same moment, the later record counts
            time.sleep(BEAT_S / 5)
            if not (now := self._record()).startswith(self.name):
                raise ValueError(f"{directory} is in use: {now.partition(', beat')[0]} has just begun to write to it")

    def _alive(self, record: str) -> bool:
        log.info("%s is of %s; waiting %.0f s for a sign of life", self.path, record, BEATS * BEAT_S)
        end = time.monotonic() + BEATS * BEAT_S
        while time.monotonic() < end:
            time.sleep(BEAT_S / 5)
            if (now := self._record()) != record:
                return bool(now)
        return False

    def _record(self) -> str:
        # fsync makes NFS read the server's copy. Opening the file again would too, but closing it would drop our lock.
        os.fsync(self._handle)
        return os.pread(self._handle, 1000, 0).decode(errors="replace").partition("\n")[0]

    def _write(self, beat: int) -> None:
        record = f"{self.name}, beat {beat}\n".encode()
        os.pwrite(self._handle, record, 0)  # over the old record: an empty file would mean that nobody holds the lock
        os.ftruncate(self._handle, len(record))
        os.fsync(self._handle)

    def _beat(self) -> None:
        beat = 0
        while not self._over.wait(BEAT_S):
            beat += 1
            try:
                self._write(beat)
            except OSError as error:  # a full disk is reported by whatever must be saved
                log.debug("%s: no heartbeat: %s", self.path, error)
