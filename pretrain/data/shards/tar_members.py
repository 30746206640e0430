"""The members of a tar, from its headers alone: V7, ustar, pax and GNU tars with long names, large sizes, sparse files.

Python's tarfile would do for honest tars. But it follows headers that describe the next one by recursion, reads
whatever size they claim, searches them in quadratic time and holds every member in memory; and it ends silently at a
bad header, at the end of a file that lost its last members, and at the first end mark.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, NoReturn

from pretrain.data.shards.cache import ShardError
from pretrain.files import open_regular

BLOCK = 512
# Limits for headers that describe the next one: such a header holds a path and some attributes, and a member has one of
# them, seldom three.
MAX_EXTRA_BYTES, MAX_EXTRAS = 2**20, 16

FILE, FOLDER, LINK, SPARSE, SPECIAL = "file", "folder", "link", "sparse", "special"
BEHIND = "behind"  # anything behind the first end mark, where readers of tars stop
_KINDS = {b"0": FILE, b"\0": FILE, b"7": FILE, b"1": LINK, b"2": LINK, b"5": FOLDER, b"S": SPARSE}
_WITHOUT_CONTENT = b"123456"  # types that have none, whatever size they claim
_LONG_NAME, _LONG_LINK, _GLOBAL, _PAX = b"L", b"K", b"g", b"xX"
_GNU_SPARSE = b"GNU.sparse."
_WAY_OUT = "write or download it again, or remove it"
# The first bytes of compressed files, which are often called .tar too: the format, its ending, and the command that
# makes a plain tar of it.
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gz", "gunzip"),
    b"BZh": ("bzip2", "bz2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zst", "unzstd --rm"),
}


class TarMember(NamedTuple):
    """A member of a tar, as its header describes it."""

    name: str  # untrusted; bytes that are not UTF-8 are surrogates
    kind: str  # FILE, FOLDER, LINK, SPARSE, SPECIAL or BEHIND
    offset: int  # of the content, in bytes from the start of the tar
    size: int  # of the content as it is stored, in bytes


def tar_members(path: str | Path) -> Iterator[TarMember]:
    """Every member of a plain tar in order, and members behind its end mark as BEHIND. Memory does not grow with the
    tar. ShardError, naming the byte, if it is truncated or damaged, or not a tar."""
    with _open(path) as file:
        tar, at, kind = _Tar(file, str(path), os.fstat(file.fileno()).st_size), 0, ""
        while True:
            try:
                member, end = tar.member(at)
            except ShardError:
                if not kind:
                    raise
                yield TarMember("", BEHIND, at, tar.size - at)
                return
            if member is not None:
                yield member._replace(kind=kind or member.kind)
                at = end
            elif (behind := tar.data_behind(end)) is not None:
                at, kind = behind, BEHIND
            else:
                return


def _open(path: str | Path) -> BinaryIO:
    try:
        return open_regular(path)
    except FileNotFoundError:
        if not os.path.islink(path):
            raise
        raise ShardError(f"{path} is a link to {os.readlink(path)}, which is missing; restore it, or unlink") from None
    except ValueError as error:
        raise ShardError(f"{error}; {_WAY_OUT}") from None


class _Header(NamedTuple):
    name: str
    type: bytes
    size: int
    goes_on: bool  # further blocks follow, which say where a sparse file has its holes


@dataclass
class _Extras:
    """The attributes of a member that the headers before it give. If several give the same one, the first counts."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False

    def add(self, kind: bytes, data: bytes) -> None:
        """ValueError, saying why, for a header that cannot be understood."""
        if kind in _LONG_NAME:
            self.name = self.name or _text(data.partition(b"\0")[0])
        if kind not in _PAX + _GLOBAL:
            return
        records = _pax_records(data)
        own = {b"path", b"size"} & records.keys() or any(name.startswith(_GNU_SPARSE) for name in records)
        if kind in _GLOBAL and own:
            raise ValueError("a header for all members names a single one")
        if name := records.get(b"GNU.sparse.name", records.get(b"path")):
            self.name = self.name or _text(name).rstrip("/")
        if (size := records.get(b"size")) is not None and self.size is None:
            if not size.isdigit() or len(size) > 20:
                raise ValueError("a member's size is no number")
            self.size = int(size)
        self.sparse = self.sparse or any(name.startswith(_GNU_SPARSE) for name in records)


@dataclass(frozen=True)
class _Tar:
    file: BinaryIO
    path: str
    size: int

    def member(self, start: int) -> tuple[TarMember | None, int]:
        """The member whose headers begin at `start` and where the next one begins; (None, its place) at an end mark."""
        extras, at, described = _Extras(), start, False
        for _ in range(MAX_EXTRAS + 1):
            block = self._block(at)
            if not any(block):
                if described:
                    self._fail(f"is damaged at byte {start}: a header describes a member that does not follow")
                return None, at
            header = self._header(block, at)
            if header.type not in _LONG_NAME + _LONG_LINK + _GLOBAL + _PAX:
                return self._described(header, extras, at)
            if header.size > MAX_EXTRA_BYTES:
                claim = f"a header of {header.size:,} bytes for the next member; at most {MAX_EXTRA_BYTES:,} are read"
                self._fail(f"is damaged at byte {at}: it claims {claim}")
            try:
                extras.add(header.type, self._read(at + BLOCK, header.size))
            except ValueError as error:
                if isinstance(error, ShardError):
                    raise
                self._fail(f"is damaged at byte {at}: {error}")
            described = described or header.type not in _GLOBAL
            at += BLOCK + _padded(header.size)
        self._fail(f"is damaged at byte {start}: more than {MAX_EXTRAS} headers describe one member")

    def data_behind(self, end: int) -> int | None:
        """The place of the first block behind `end` that is not all zeros; None if there is none."""
        self.file.seek(end)
        while chunk := self.file.read(2**20):
            if rest := len(chunk.lstrip(b"\0")):
                return end + (len(chunk) - rest) // BLOCK * BLOCK
            end += len(chunk)
        return None

    def _described(self, header: _Header, extras: _Extras, at: int) -> tuple[TarMember, int]:
        at += BLOCK
        goes_on = header.goes_on
        while goes_on:
            goes_on, at = bool(self._block(at)[504]), at + BLOCK
        name = header.name if extras.name is None else extras.name
        kind = _KINDS.get(header.type, SPECIAL)
        if kind == FILE and extras.sparse:
            kind = SPARSE
        if header.type == b"\0" and header.name.endswith("/"):  # V7 has no type for folders
            return TarMember(name, FOLDER, at, 0), at
        size = 0 if header.type in _WITHOUT_CONTENT else header.size if extras.size is None else extras.size
        if at + size > self.size:
            end = f"inside {name!r}, which ends at byte {at + size}"
            self._fail(f"is truncated at byte {self.size}, {end}")
        return TarMember(name, kind, at, size), at + _padded(size)

    def _header(self, block: bytes, at: int) -> _Header:
        checksum, size = _number(block[148:156]), _number(block[124:136])
        if size is None or all(checksum != right for right in _checksums(block)):
            self._fail(f"is damaged at byte {at}: there is no tar header" if at else self._no_tar(block))
        name, prefix = (_text(field.partition(b"\0")[0]) for field in (block[:100], block[345:500]))
        if size < 0:
            self._fail(f"is damaged at byte {at}: {name!r} has a size below 0")
        if prefix and block[257:263] == b"ustar\0":  # GNU's own format has times there
            name = f"{prefix}/{name}"
        return _Header(name, block[156:157], size, block[156:157] == b"S" and bool(block[482]))

    def _no_tar(self, block: bytes) -> str:
        for magic, (what, ending, command) in _COMPRESSED.items():
            if block.startswith(magic):
                path, packed = shlex.quote(self.path), shlex.quote(f"{self.path}.{ending}")
                return f"is compressed by {what}; make a plain tar of it: mv {path} {packed} && {command} {packed}"
        return "is not a tar: it does not begin with a tar header"

    def _block(self, at: int) -> bytes:
        if at == self.size > 0:
            self._fail(f"is truncated at byte {self.size}: the end mark is missing")
        return self._read(at, BLOCK)

    def _read(self, at: int, size: int) -> bytes:
        self.file.seek(at)
        data = self.file.read(size)
        if len(data) < size:
            compressed = at == 0 and data.startswith(tuple(_COMPRESSED))
            self._fail(self._no_tar(data) if compressed else f"is truncated at byte {self.size}")
        return data

    def _fail(self, why: str) -> NoReturn:
        raise ShardError(f"{self.path} {why}" if "make a plain tar" in why else f"{self.path} {why}; {_WAY_OUT}")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int | None:
    """A number of a header, octal digits or GNU's base 256; None for anything else."""
    if field[0] in (0o200, 0o377):
        return int.from_bytes(field[1:], "big") - (field[0] == 0o377) * 256 ** (len(field) - 1)
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else None


def _checksums(block: bytes) -> Iterator[int]:
    """The two sums that a header may have: early tars added the bytes up as signed ones."""
    total = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    yield total
    yield total - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """The records "LENGTH NAME=VALUE\\n". ValueError if they are damaged."""
    records, at = dict[bytes, bytes](), 0
    while at < len(data) and data[at]:
        digits = data[at : at + 10].partition(b" ")[0]
        end = at + int(digits) if digits.isdigit() else 0
        name, equals, value = data[at + len(digits) + 1 : end - 1].partition(b"=")
        if not equals or end > len(data) or data[end - 1 : end] != b"\n":
            raise ValueError("a pax header's records are damaged")
        records[name], at = value, end
    return records
