"""Files that stay whole through a kill or a loss of power: written under another name, synced, renamed, and their
directory synced."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

WRITING = ".writing"  # the ending of names of incomplete files and directories


def open_regular(path: str | Path) -> BufferedReader:
    """A regular file, opened for reading. ValueError for anything else."""
    return open(regular_descriptor(path), "rb")


def regular_descriptor(path: str | Path) -> int:
    """`open_regular` as a descriptor, which the caller closes. Opening a pipe without a writer would block for ever,
    and ignore every signal."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise ValueError(f"{path} is {_file_type(mode)}, not a regular file")
    return handle


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a regular file's content. ValueError for anything else."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_type(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device or a socket")


def beside(path: Path, writer: str = "") -> Path:
    """The hidden name under which `path` is written, in the same directory. `writer` distinguishes processes that may
    write it at the same time."""
    return path.with_name(f".{path.name}{writer and '.'}{writer}{WRITING}")


def write_file(path: Path, data: bytes) -> None:
    """Writes a file so that it holds either the old or the new content, whatever happens, also if several processes
    write it at the same time. OSError with the file's name."""
    try:
        with _in_one_step(path, beside(path, secrets.token_hex(4))) as growing:
            growing.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, f"could not be written: {error.strerror}", str(path)) from None


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON by `write_file`."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


@contextmanager
def written_in_one_step(path: Path) -> Iterator[Path]:
    """Yields the name under which to write; at the end of the block that file becomes `path`, and after an exception
    `path` is unchanged. Only one process may write `path` at a time; it removes what a killed one left."""
    folder = beside(path)  # for the library's own temporary files too: safetensors leaves .tmpXXXXXX when it is killed
    _remove(folder)
    folder.mkdir()
    try:
        with _in_one_step(path, folder / path.name) as growing:
            yield growing
    finally:
        _remove(folder)


@contextmanager
def _in_one_step(path: Path, growing: Path) -> Iterator[Path]:
    try:
        growing.touch()
        mode = growing.stat().st_mode  # as the umask says: libraries that write through a temporary file set 0600
        yield growing
        growing.chmod(mode)
        move(growing, path)
    except BaseException:
        growing.unlink(missing_ok=True)
        raise


class Lines:
    """A file to which lines are appended, each by one write, so that a reader never sees an incomplete line in the
    middle. Raises OSError with the file's name."""

    def __init__(self, path: Path):
        self.path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: bytes) -> None:
        left = memoryview(line)
        with self._named():
            # A disk that becomes full takes a part of a write without an error; only the next write raises one.
            while left:
                left = left[os.write(self._handle, left) :]

    def sync(self) -> None:
        """Makes sure that the lines so far survive the loss of this node."""
        with self._named():
            os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, f"could not be written: {error.strerror}", str(self.path)) from None


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """An open safetensors file. Raises OSError if it cannot be read, SafetensorError for a file of another kind."""
    from safetensors import safe_open

    try:
        file = safe_open(path, framework="pt")
    except RuntimeError as error:  # torch maps the file, and raises this for any error of the disk
        raise OSError(errno.EIO, f"could not be read: {str(error).splitlines()[0]}", str(path)) from error
    with file:
        yield file


def move(path: Path, place: Path) -> None:
    """Renames a complete file, or a directory of synced files, to `place` in one step, and syncs."""
    sync(path)
    os.replace(path, place)
    sync(place.parent)


def sync(path: Path) -> None:
    """Makes a written file, or a directory's entries, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(directory: Path) -> None:
    """Removes incomplete files that killed processes left. No other process may be writing there."""
    for suffix in (WRITING, ".tmp"):  # .tmp: of an earlier version
        for leftover in directory.glob(f".*{suffix}"):
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
