"""Detects that a part of a picture is missing where its decoder fills it in and raises no error.

libjpeg fills missing parts with grey; a message on the process's standard error stream is the only sign. Pillow reads a
PNG whose data end early as if the rest were black.
"""

from __future__ import annotations

import math
import os
import struct
import threading
import zlib

import cv2
import numpy as np
from PIL import Image

# How libjpeg's messages about missing or damaged data begin. Its other warnings (revisions, colour transforms) are
# about no pixel.
_DAMAGE = (b"Corrupt JPEG data", b"Premature end of JPEG file")
_HARMLESS = b"bad ICC marker"
# Adam7: first column and row of each pass, and the steps from there.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types
_AT_ONCE = 2**20


class _Stderr:
    """A file in memory that stands in for the standard error stream; one for each process."""

    def __init__(self) -> None:
        self.lock, self.file = threading.Lock(), -1

    def capture(self) -> int:
        """Redirects descriptor 2 into the file -> the argument for `release`."""
        if self.file < 0:
            self.file = os.memfd_create("libjpeg")
        try:
            own = os.dup(2)
        except OSError:  # it is closed
            own = -1
        os.dup2(self.file, 2)
        return own

    def release(self, own: int) -> bytes:
        """Ends the redirection -> what was written since `capture`."""
        if own < 0:
            os.close(2)
        else:
            os.dup2(own, 2)
            os.close(own)
        size = os.lseek(self.file, 0, os.SEEK_CUR)
        if not size:
            return b""
        text = os.pread(self.file, size, 0)
        os.ftruncate(self.file, 0)
        os.lseek(self.file, 0, os.SEEK_SET)
        return text

    def renew(self) -> None:
        """Starts anew after a fork: the child would share the file's position, and perhaps a lock that is never
        released."""
        if self.file >= 0:
            os.close(self.file)
        self.lock, self.file = threading.Lock(), -1


_STDERR = _Stderr()
os.register_at_fork(after_in_child=_STDERR.renew)


def imdecode(data: bytes, flags: int) -> tuple[np.ndarray | None, str]:
    """Decodes a JPEG by OpenCV -> (BGR or None, libjpeg's message about missing data or ""). Everything else that is
    written to the standard error stream meanwhile is passed on afterwards."""
    text = b""
    with _STDERR.lock:
        own = _STDERR.capture()
        try:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        except cv2.error:
            pixels = None
        finally:
            text = _STDERR.release(own)
    damage = ""
    for line in text.splitlines(keepends=True):
        if line.startswith(_DAMAGE) and _HARMLESS not in line:
            damage = damage or line.decode(errors="replace").strip()
        elif own >= 0:
            os.write(2, line)
    return pixels, damage


def jpeg_damage(data: bytes) -> str:
    """libjpeg's message about missing data in a JPEG that Pillow has decoded, which may lack its end marker; or ""."""
    return imdecode(data + b"\xff\xd9", cv2.IMREAD_REDUCED_GRAYSCALE_8)[1]


def png_damage(data: bytes, image: Image.Image) -> str:
    """What is missing of a PNG that Pillow has decoded; "" if nothing is. Rows that were never filled are black, so the
    data are unpacked once more only if one of the last two rows is (two, since in an interlaced picture only every
    other row may be missing)."""
    width, height = image.size
    last = np.asarray(image.crop((0, max(height - 2, 0), width, height)))
    if all(row.any() for row in last):
        return ""
    expected = _packed_bytes(data)
    unpacked = _unpacked_bytes(data, expected)
    if unpacked >= expected:
        return ""
    return f"its data end after {unpacked} of {expected} bytes"


def _packed_bytes(data: bytes) -> int:
    """The bytes of all rows, each with its filter byte, by the header."""
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    total = 0
    for x, y, right, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = math.ceil(max(width - x, 0) / right), math.ceil(max(height - y, 0) / down)
        total += rows * (1 + math.ceil(columns * bits * _CHANNELS[colour] / 8)) if columns else 0
    return total


def _unpacked_bytes(data: bytes, enough: int) -> int:
    """The bytes that the IDAT chunks hold, as far as they can be unpacked; stops counting at `enough`."""
    unpacker, total, place = zlib.decompressobj(), 0, 8
    try:
        while place + 8 <= len(data):
            length, name = struct.unpack(">I4s", data[place : place + 8])
            part = data[place + 8 : place + 8 + length] if name == b"IDAT" else b""
            while part and not unpacker.eof and total < enough:
                total += len(unpacker.decompress(part, _AT_ONCE))
                part = unpacker.unconsumed_tail
            place += length + 12
        total += len(unpacker.flush())
    except zlib.error:
        pass
    return total
