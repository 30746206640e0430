"""The index of one shard: the byte offset of each member of each sample in the tar.

The format is that of DALI's wds2idx: a line `v1.2 SAMPLES`, then one line per sample with `EXTENSION OFFSET SIZE
NAME` for each member. Fields are separated by blanks, so white space, percent signs and non-ASCII characters in names
are percent-encoded. Keys and extensions are split as webdataset splits them: at the first dot of the file name. Behind
the last sample, where DALI does not look, a line `crc32 HEX` has eight digits for each member, in the order of the
lines above; indexes of earlier versions have none.

Names are untrusted: they are compared and printed, never used as paths. Members with endings other than EXTENSIONS do
not enter the index, so nothing can read them by mistake.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn
from urllib.parse import quote, unquote

import numpy as np

from pretrain.data.shards.cache import ShardError
from pretrain.data.shards.left_out import REPLACED, count, why_left_out
from pretrain.data.shards.tar_members import FOLDER, TarMember, tar_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "jpe")  # the last two: JPEGs by older names
SECOND_PICTURE = "jpe"  # the member of a sample's second picture, as of NLVR2; readers of one take the first
EXTENSIONS = (*IMAGE_EXTENSIONS, "txt", "json")
VERSION = b"v1.2"
MAX_INDEX_BYTES = 2**32  # that are read: 40 million samples
_PLAIN = "".join(sorted(set(string.punctuation) - {"%"}))
_NEWLINE, _BLANK = ord("\n"), ord(" ")
_SUMS = b"crc32 "
_DIGITS = 18  # of an offset or a size: below 2**63, the largest that the system takes


class Member(NamedTuple):
    """A member of a sample in a shard."""

    extension: str  # lower case, one of EXTENSIONS
    offset: int  # of the content, in bytes from the start of the tar
    size: int
    name: str  # percent-encoded
    crc32: int | None = None  # of the content; None: not known


class ShardIndex:
    """A parsed .idx: its bytes, and the start of each line. ShardError, naming `where`, if it is damaged."""

    def __init__(self, data: bytes, where: str):
        self._where = where
        # The lines with the members' places; an index of an earlier version has nothing else.
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
            if not (offset.isdecimal() and size.isdecimal() and max(len(offset), len(size)) <= _DIGITS):
                self._damaged(f"an offset or a size of sample {sample} is not a number of bytes")
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
    """A member's name -> (key, extension in lower case). The key is "" where webdataset finds none, which is so for
    most hidden files; the extension of a name without a dot is ""."""
    slash = name.rfind("/") + 1
    stem, dot, extension = name[slash:].partition(".")
    if stem:
        return name[:slash] + stem, extension.lower()
    # For FOLDER/.EXTENSION webdataset's pattern finds the key FOLDER/, unless the folder's own name has a dot.
    folder = name[name.rfind("/", 0, max(slash - 1, 0)) + 1 : slash]
    return name[:slash] if dot and folder and "." not in folder else "", extension.lower()


class Part(NamedTuple):
    """A member of a tar, and of a sample unless it is left out."""

    key: str
    extension: str  # in lower case
    member: TarMember
    left_out: str  # why it belongs to no sample, see left_out.py; "": it belongs to one


def shard_parts(path: str | Path) -> Iterator[Part]:
    """Every member of a tar except folders. ShardError if the tar is truncated, damaged or not a plain one."""
    for member in tar_members(path):
        if member.kind != FOLDER:
            key, extension = split_name(member.name)
            yield Part(key, extension, member, why_left_out(member, key, extension, EXTENSIONS))


def index_shard(path: str | Path) -> ShardIndex:
    """Reads the headers of a tar, not its contents. ShardError if it is truncated, damaged or not a plain tar.

    Members with the same key make one sample, wherever they are in the tar; of two with the same key and extension the
    later counts, as in unpacking.
    """
    return scan_shard(path)[0]


def scan_shard(path: str | Path) -> tuple[ShardIndex, Counter[str]]:
    """`index_shard`, and how many members belong to no sample, by reason (left_out.py)."""
    samples: dict[str, dict[str, str]] = {}
    left_out = Counter[str]()
    for key, extension, member, reason in shard_parts(path):
        if reason:
            count(left_out, reason)
            continue
        name = quote(member.name, safe=_PLAIN, errors="surrogateescape")
        members = samples.setdefault(key, {})
        if extension in members:
            count(left_out, REPLACED)
        members[extension] = f"{extension} {member.offset} {member.size} {name}"
    lines = [f"{VERSION.decode()} {len(samples)}", *(" ".join(members.values()) for members in samples.values())]
    return ShardIndex("\n".join([*lines, ""]).encode("ascii"), str(path)), left_out
