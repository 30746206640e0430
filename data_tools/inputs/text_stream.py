"""Files of text from outside, as streams of UTF-8: unpacked, in whatever encoding they are, with lines that end in \\n.

Encodings are told by their byte order mark, and UTF-16 without one by the zero bytes of its ASCII characters. Bytes
that are neither UTF-16 nor UTF-32 stay as they are, so the reader of a row decides whether it is UTF-8.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import os
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, BinaryIO

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_MARKS = [
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, because its mark begins like that one's
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]
_HEAD = 2**16  # bytes that decide
_BUFFER = 2**20
_MANY_ZEROS = 0.25  # of the first or second bytes of UTF-16; URLs are ASCII in a text of any language
_WINDOW = "requires too much memory"  # zstd on a frame whose window is above its default limit of 128 MiB


def check_regular(path: Path, what: str) -> None:
    """Raises ValueError, naming the option or file `what`, for a pipe or a device: reading it could wait for ever."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        kind = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise ValueError(f"{what} is {kind}, not a file; write its content to a file and give that")


def open_text(path: Path) -> BinaryIO:
    """The text of a file, unpacked by its ending. Reading raises ValueError, naming the file, where it is damaged."""
    check_regular(path, str(path))
    raw = path.open("rb")
    try:
        return as_utf8(unpacked(raw, path), path, raw.close)
    except BaseException:
        raw.close()
        raise


def unpacked(raw: IO[bytes], path: Path) -> IO[bytes]:
    """The content of the open file `raw`, by the ending of `path`."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if ending == ".bz2":
        return bz2.open(raw)
    if ending == ".xz":
        return lzma.open(raw)
    if ending == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), _BUFFER)
    return raw


def as_utf8(file: IO[bytes], path: Path, close: Callable[[], None] = lambda: None) -> BinaryIO:
    """`close` is called after `file` was closed."""
    return io.BufferedReader(_Utf8(file, path, close), _BUFFER)


class _Utf8(io.RawIOBase):
    def __init__(self, file: IO[bytes], path: Path, close: Callable[[], None]):
        self._file, self._path, self._close = file, path, close
        head = self._read(_HEAD)
        encoding, mark = _encoding(head)
        self._decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._over = False
        self._ready = self._utf8(head[mark:])
        # Old programs of the Macintosh end lines in \r.
        self._old_lines = b"\r" in self._ready and b"\n" not in self._ready
        if self._old_lines:
            self._ready = self._ready.replace(b"\r", b"\n")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready and not self._over:
            self._ready = self._utf8(self._read(len(buffer)))
            if self._old_lines:
                self._ready = self._ready.replace(b"\r", b"\n")
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self._close()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise _damaged(self._path, error) from None
        except OSError as error:
            if _WINDOW in str(error):
                raise ValueError(
                    f"{self._path} was compressed with zstd --long=28 or more, which takes as much memory to read; the "
                    f"limit is 128 MiB (--long=27), so compress it again: zstd -dc --long=31 {self._path.name} | zstd "
                    f"-o new.{self._path.name}"
                ) from None
            if error.filename is None and error.errno is None:  # a decompressor's own error
                raise _damaged(self._path, error) from None
            raise

    def _utf8(self, data: bytes) -> bytes:
        self._over = not data
        if self._decoder is None:
            return data
        try:
            # A lone surrogate becomes invalid UTF-8, and counts as such.
            return self._decoder.decode(data, final=self._over).encode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise _damaged(self._path, f"it is {error.encoding}, but {error.reason}") from None


def _damaged(path: Path, why: object) -> ValueError:
    return ValueError(f"{path} is truncated or damaged ({why}); fetch it again or omit it")


def _encoding(head: bytes) -> tuple[str, int]:
    """(codec, bytes of its mark)."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding, len(mark)
    first, second = head[0::2].count(0), head[1::2].count(0)
    many, few = _MANY_ZEROS * len(head) / 2, _MANY_ZEROS * len(head) / 20
    if second > many and first < few:
        return "utf-16-le", 0
    if first > many and second < few:
        return "utf-16-be", 0
    return "utf-8", 0
