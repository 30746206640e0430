"""Files that a kill or a loss of power leaves whole: written beside, synced, renamed, the directory synced."""

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

WRITING = ".writing"  # ends the name of whatever is not whole yet


def open_regular(path: str | Path) -> BufferedReader:
    """A regular file, opened for reading. ValueError for anything else."""
    return open(regular_descriptor(path), "rb")


def regular_descriptor(path: str | Path) -> int:
    """The same as a descriptor, which the caller closes. A pipe without a writer would be waited for, for ever and deaf
    to every signal."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise ValueError(f"{path} is {_file_type(mode)}, not a regular file")
    return handle


def sha256_of(path: str | Path) -> str:
    """Of the content of a regular file. ValueError for anything else."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_type(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe"}
    return kinds.get(stat.S_IFMT(mode), "a device or a socket")


def beside(path: Path, writer: str = "") -> Path:
    """Where `path` grows: a hidden name in its directory. `writer` tells apart those that may write it at one time."""
    return path.with_name(f".{path.name}{writer and '.'}{writer}{WRITING}")


def write_file(path: Path, data: bytes) -> None:
    """The file holds the old content or the new, whatever happens, and however many processes write it at one time."""
    try:
        with _in_one_step(path, beside(path, secrets.token_hex(4))) as growing:
            growing.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, f"could not be written: {error.strerror}", str(path)) from None


def write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


@contextmanager
def written_in_one_step(path: Path) -> Iterator[Path]:
    """Gives the name under which to write what `path` is to hold when the block ends; an exception leaves `path` as it
    was. For one process at a time, which removes what a killed one left."""
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
        mode = growing.stat().st_mode  # by the umask: libraries that write through a temporary file make it 0600
        yield growing
        growing.chmod(mode)
        move(growing, path)
    except BaseException:
        growing.unlink(missing_ok=True)
        raise


class Lines:
    """A file that grows line by line, each of them in one write: a reader never sees half of one in the middle. Raises
    OSError with the file's name."""

    def __init__(self, path: Path):
        self.path = path
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, line: bytes) -> None:
        left = memoryview(line)
        with self._named():
            # A disk that fills takes a part of a write, without an error; the next write tells it.
            while left:
                left = left[os.write(self._handle, left) :]

    def sync(self) -> None:
        """What was written survives the loss of the node."""
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
    """An open safetensors file. Raises OSError where it cannot be read, SafetensorError for a file of another kind."""
    from safetensors import safe_open

    try:
        file = safe_open(path, framework="pt")
    except RuntimeError as error:  # of torch, which maps the file, for whatever the disk says
        raise OSError(errno.EIO, f"could not be read: {str(error).splitlines()[0]}", str(path)) from error
    with file:
        yield file


def move(path: Path, place: Path) -> None:
    """A whole file, or a directory of synced files, takes its place in one step."""
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
    """Removes what killed processes left half-written; only where no other process writes now."""
    for suffix in (WRITING, ".tmp"):  # .tmp: of an earlier version
        for leftover in directory.glob(f".*{suffix}"):
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
