"""The index of one shard: the byte offset of each member of each sample in the tar.

The format is that of DALI's wds2idx: a line `v1.2 SAMPLES`, then one line per sample with `EXTENSION OFFSET SIZE
NAME` for each member. Fields are separated by blanks, so white space, percent signs and non-ASCII characters in names
are percent-encoded. Keys and extensions are split as in webdataset: at the first dot of the file name. Behind the last
sample, where DALI does not look, a line `crc32 HEX` has eight digits for each member, in the order of the lines above;
indexes of earlier versions have none.

Names are untrusted: they are compared and printed, never used as paths. Members with endings other than EXTENSIONS do
not enter the index, so nothing can read them by mistake.
"""

from __future__ import annotations

import os
import string
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import quote, unquote

import numpy as np

from pretrain.data.shards.cache import ShardError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")
VERSION = b"v1.2"
_PLAIN = "".join(sorted(set(string.punctuation) - {"%"}))
_NEWLINE, _BLANK = ord("\n"), ord(" ")
_SUMS = b"crc32 "
_WAY_OUT = "write or download it again, or remove it"


class Member(NamedTuple):
    extension: str  # lower case, one of EXTENSIONS
    offset: int  # of the content, in bytes from the start of the tar
    size: int
    name: str  # percent-encoded
    crc32: int | None = None  # of the content; None: not known


class ShardIndex:
    """A parsed .idx: its bytes, and the start of each line. ShardError, naming `where`, if it is damaged."""

    def __init__(self, data: bytes, where: str):
        self._where = where
        # What says where the members are: all that an index of an earlier version has.
        self.places, _, sums = data.partition(b"\n" + _SUMS)
        if sums:
            self.places += b"\n"
        head = data[: data.find(b"\n") + 1].split()
        text = np.frombuffer(self.places, np.uint8)
        self._ends = np.flatnonzero(text == _NEWLINE)
        self.samples = max(len(self._ends) - 1, 0)
        if not data.endswith(b"\n") or head != [VERSION, str(self.samples).encode()]:
            self._damaged(
                f"its first line is not '{VERSION.decode()} {self.samples}', which has the number of lines that follow"
            )
        self._sums: bytes | None = None
        if sums:
            # Members before each sample: a line of n members has 4 n fields, and so 4 n - 1 blanks.
            blanks = np.searchsorted(np.flatnonzero(text == _BLANK), self._ends)
            self._before = (blanks - blanks[0] + np.arange(len(blanks))) // 4
            self._sums = self._parse_sums(sums.rstrip(b"\n"))

    @property
    def data(self) -> bytes:
        """The content of the .idx file."""
        return self.places if self._sums is None else self.places + _SUMS + self._sums.hex().encode() + b"\n"

    def _parse_sums(self, text: bytes) -> bytes:
        try:
            sums = bytes.fromhex(text.decode("ascii"))
        except ValueError:
            self._damaged("its checksums are not hexadecimal")
        if len(sums) != 4 * self._before[-1]:
            self._damaged(f"it has {len(sums) // 4} checksums for {self._before[-1]} members")
        return sums

    def with_sums(self, sums: list[int]) -> ShardIndex:
        """With the CRC-32 of each member, in the order of the samples and their members."""
        text = b"".join(value.to_bytes(4, "big") for value in sums).hex().encode()
        return ShardIndex(self.places + _SUMS + text + b"\n", self._where)

    def members(self, sample: int) -> list[Member]:
        """The members of one sample with one of EXTENSIONS, in the order of the tar."""
        fields = self._line(sample)
        members = []
        for place, start in enumerate(range(0, len(fields), 4)):
            extension, offset, size, name = fields[start : start + 4]
            if not (offset.isdecimal() and size.isdecimal()):
                self._damaged(f"an offset or a size of sample {sample} is not a number")
            if extension.lower() in EXTENSIONS:
                crc32 = None if self._sums is None else self._sum(int(self._before[sample]) + place)
                members.append(Member(extension.lower(), int(offset), int(size), name, crc32))
        return members

    def _sum(self, number: int) -> int:
        assert self._sums is not None
        return int.from_bytes(self._sums[4 * number : 4 * number + 4], "big")

    def key(self, sample: int) -> str:
        """The key of a sample, printable: bytes that are not UTF-8 become \\xNN."""
        name = unquote(split_name(self._line(sample)[3])[0], errors="surrogateescape")
        return name.encode(errors="surrogateescape").decode(errors="backslashreplace")

    def _line(self, sample: int) -> list[str]:
        assert 0 <= sample < self.samples, (sample, self.samples)
        line = self.places[self._ends[sample] + 1 : self._ends[sample + 1]]
        fields = line.decode(errors="replace").split()
        if not fields or len(fields) % 4:
            self._damaged(f"the line of sample {sample} lacks the four fields per member")
        return fields

    def _damaged(self, reason: str) -> NoReturn:
        raise ShardError(f"the index {self._where} is damaged: {reason}; run python -m data_tools.index again")


def split_name(name: str) -> tuple[str, str]:
    """A member's name -> (key, extension in lower case). The key of a hidden file is "" (or ends in a slash); the
    extension of a name without a dot is ""."""
    slash = name.rfind("/") + 1
    stem, _, extension = name[slash:].partition(".")
    return name[:slash] + stem if stem else "", extension.lower()


def index_shard(path: str | Path) -> ShardIndex:
    """Reads the headers of a tar, not its contents. ShardError if it is truncated, damaged or not a plain tar.

    Links, directories and sparse files are skipped. Members with the same key make one sample, wherever they are in the
    tar; the later of two with the same name counts, as in unpacking.
    """
    samples: dict[str, dict[str, str]] = {}
    for member in tar_members(path):
        key, extension = split_name(member.name)
        if key and extension in EXTENSIONS and member.isreg() and not member.issparse():
            name = quote(member.name, safe=_PLAIN, errors="surrogateescape")
            line = f"{extension} {member.offset_data} {member.size} {name}"
            samples.setdefault(key, {})[extension] = line
    lines = [f"{VERSION.decode()} {len(samples)}", *(" ".join(members.values()) for members in samples.values())]
    return ShardIndex("\n".join([*lines, ""]).encode("ascii"), str(path))


def tar_members(path: str | Path) -> Iterator[tarfile.TarInfo]:
    """Every member of a plain tar, from its headers alone. ShardError, naming the byte, where it is truncated or
    damaged: tarfile itself stops silently at a bad header, and at the end of a file that lost its last members."""
    size = end = 0  # end: of the last complete member, with its padding
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Only mode `r:`: a compressed tar cannot be read by offset.
            with tarfile.open(str(path), "r:", fileobj=file) as tar:
                while (member := tar.next()) is not None:
                    if member.size < 0 or tar.offset <= end:  # an old tarfile would loop backwards forever
                        raise tarfile.ReadError(f"{member.name!r} has a size below 0")
                    if member.offset_data + member.size > size:
                        raise ShardError(
                            f"{path} is truncated at byte {size}, inside {member.name!r}, which ends at byte "
                            f"{member.offset_data + member.size}; {_WAY_OUT}"
                        )
                    end = tar.offset
                    yield member
            file.seek(end)
            mark = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        if isinstance(error, ShardError):
            raise
        if size < max(end, tarfile.BLOCKSIZE):
            what = f"is truncated at byte {size}"
        elif end == 0:
            what = f"is not a plain tar (compressed ones cannot be read): {error}"
        else:
            what = f"is damaged after byte {end}: {error}"
        raise ShardError(f"{path} {what}; {_WAY_OUT}") from None
    if len(mark) < tarfile.BLOCKSIZE:
        raise ShardError(f"{path} is truncated at byte {size}: the end mark is missing; {_WAY_OUT}")
    if any(mark):
        raise ShardError(f"{path} is damaged at byte {end}: there is no tar header; {_WAY_OUT}")
