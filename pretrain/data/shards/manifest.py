"""The manifest of a source: which shards it has, and the samples and bytes of each.

`manifest.json` lies beside the shards that it lists; data_tools.index writes it. Patterns may join several such
directories, or parts of them, into one source; remote directories are read the same way.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.data.shards.cache import fetch, is_remote, redact
from pretrain.data.shards.left_out import is_reason
from pretrain.json_files import parse_json, read_bytes, typed
from pretrain.settings import fill_variables

MANIFEST, MANIFEST_VERSION = "manifest.json", 2
_WITHOUT_HASHES = 1  # the version before: only names, counts and sizes
MAX_MANIFEST_BYTES = 2**30
_GLOB = re.compile(r"[*?\[]")
# PREFIX NAME.tar SUFFIX of a remote shard: a query, or the rest of a pipe's command, may follow the name.
_REMOTE_SHARD = re.compile(r"(?P<prefix>.*[/\s:])(?P<name>[^/\s:?'\"]+\.tar)(?P<suffix>.*)$", re.DOTALL)
_SHA256 = re.compile("[0-9a-f]{64}")
# The characters allowed in a remote name, because it becomes part of a URL or of a pipe's command.
_REMOTE_NAME = re.compile(r"[\w.,=+@~-]+", re.ASCII)


class Shard(NamedTuple):
    """One shard, as its manifest lists it."""

    url: str  # a local path, or a URL or pipe: that transfer.py fetches
    samples: int
    bytes: int
    sha256: str = ""  # of the tar; "": indexed by an earlier version
    index_sha256: str = ""  # of the .idx
    left_out: tuple[tuple[str, int], ...] | None = None  # members of no sample, by reason (left_out.py); None: unknown

    @property
    def name(self) -> str:
        remote = _REMOTE_SHARD.match(self.url) if is_remote(self.url) else None
        return remote["name"] if remote else os.path.basename(self.url)

    @property
    def index_url(self) -> str:
        return self.beside(f"{self.name.removesuffix('.tar')}.idx")

    def beside(self, name: str) -> str:
        """The file `name` in the shard's directory."""
        remote = _REMOTE_SHARD.match(self.url) if is_remote(self.url) else None
        if remote is None:
            return os.path.join(os.path.dirname(self.url), name)
        return f"{remote['prefix']}{name}{remote['suffix']}"


@dataclass(frozen=True)
class Manifest:
    """The shards of a source, in the order of their numbers."""

    shards: tuple[Shard, ...]

    @cached_property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def counts(self) -> list[int]:
        """The samples of each shard, for `Order`."""
        return [shard.samples for shard in self.shards]

    @cached_property
    def digest(self) -> str:
        """Changes with any byte of a shard or its index, with any name, and with their order; not with the shards'
        location."""
        hashes = (f"\t{s.sha256}\t{s.index_sha256}" if s.sha256 else "" for s in self.shards)
        return _hash_lines(f"{_line(shard)}{more}\n" for shard, more in zip(self.shards, hashes, strict=True))

    @cached_property
    def names_digest(self) -> str:
        """The digest of version 1: of names, counts and sizes."""
        return _hash_lines(f"{_line(shard)}\n" for shard in self.shards)

    def to_json(self) -> bytes:
        """The content of manifest.json, for the shards of one directory."""
        shards = [{"name": s.name, **{field: getattr(s, field) for field in Shard._fields[1:]}} for s in self.shards]
        content = {"version": MANIFEST_VERSION, "digest": self.digest, "samples": self.samples, "shards": shards}
        return json.dumps(content, indent=1).encode() + b"\n"


def _line(shard: Shard) -> str:
    return f"{shard.name}\t{shard.samples}\t{shard.bytes}"


def _hash_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def read_manifest(data: bytes, prefix: str, suffix: str = "") -> Manifest:
    """manifest.json -> the shards "PREFIX name SUFFIX", sorted by name. ValueError if it is damaged or has another
    version."""
    where = f"{redact(prefix)}{MANIFEST}"
    remote = is_remote(prefix)
    try:
        content = parse_json(data)
        if (version := typed(content, "version", int)) not in (MANIFEST_VERSION, _WITHOUT_HASHES):
            raise ValueError(f"its version is {version}, not {MANIFEST_VERSION}")
        hashed = version == MANIFEST_VERSION
        shards = []
        for entry in sorted(typed(content, "shards", list), key=lambda entry: typed(entry, "name", str)):
            name, samples, size = typed(entry, "name", str), typed(entry, "samples", int), typed(entry, "bytes", int)
            # Only a user's own pattern may name a pipe or a URL: what a manifest names comes from outside.
            elsewhere = is_remote(f"{prefix}{name}{suffix}") and not remote
            if "/" in name or not name.endswith(".tar") or elsewhere or (remote and not _REMOTE_NAME.fullmatch(name)):
                raise ValueError(f"{name!r} is not a valid shard name")
            if samples < 0 or size < 0:
                raise ValueError(f"{name} has a negative count or size")
            hashes = {field: typed(entry, field, str) if hashed else "" for field in ("sha256", "index_sha256")}
            if hashed and not all(_SHA256.fullmatch(value) for value in hashes.values()):
                raise ValueError(f"{name} has an invalid SHA-256")
            left_out = _left_out(entry.get("left_out"))
            shards.append(Shard(f"{prefix}{name}{suffix}", samples, size, left_out=left_out, **hashes))
        manifest = Manifest(tuple(shards))
        if manifest.digest != typed(content, "digest", str):
            raise ValueError("its digest does not match its content")
        if manifest.samples >= 2**63:
            raise ValueError(f"its shards claim {manifest.samples} samples")
    except ValueError as error:
        raise ValueError(f"cannot use {where} ({error}); {_way_out(prefix)}") from None
    return manifest


def _left_out(pairs: Any) -> tuple[tuple[str, int], ...] | None:
    """Shard.left_out from a manifest's JSON; None for a manifest of an earlier version, and for anything that
    data_tools.index does not write."""
    try:
        counts = {reason: number for reason, number in pairs if is_reason(reason) and type(number) is int}
    except (TypeError, ValueError):
        return None
    return tuple(counts.items()) if len(counts) == len(pairs) else None


def load_manifest(patterns: str | tuple[str, ...]) -> Manifest:
    """The manifest of a source: every shard that matches the patterns, in their order.

    A pattern is a directory (local, or remote and ending in a slash), or shards with {00000..00099}, *, ?, [..] and
    $VARIABLES. ValueError for an unset variable, no match, a shard named twice, and a directory or shard that was not
    indexed.
    """
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    indexes: dict[tuple[str, str], dict[str, Shard]] = {}
    shards = [shard for pattern in patterns for shard in _matches(pattern, indexes)]
    if not shards:
        raise ValueError(f"shards={_shown(patterns)} matches no shard; give a directory or a pattern of .tar files")
    real_prefix = {prefix: prefix if is_remote(prefix) else os.path.realpath(prefix) for prefix, _ in indexes}
    places: set[tuple[str, str]] = set()
    for shard in shards:
        place = real_prefix[shard.url.rpartition(shard.name)[0]], shard.name
        if place in places:
            raise ValueError(f"shards={_shown(patterns)} names {redact(shard.url)} twice; name each shard once")
        places.add(place)
    return Manifest(tuple(shards))


def _shown(patterns: tuple[str, ...]) -> list[str]:
    return [redact(pattern) for pattern in patterns]


def _matches(pattern: str, indexes: dict[tuple[str, str], dict[str, Shard]]) -> Iterator[Shard]:
    from braceexpand import braceexpand

    filled = fill_variables(pattern, "shards")
    try:
        urls = list(braceexpand(filled))
    except ValueError:  # its message holds the pattern
        text = f"the braces of shards={redact(pattern)} cannot be expanded; write {{00000..00099}}"
        raise ValueError(text) from None
    for url in urls:
        matches = [
            s for place in _places(url.removeprefix("file://"), indexes) for s in _select(*place, pattern, indexes)
        ]
        if not matches:
            raise ValueError(f"shards={redact(pattern)}: nothing matches {redact(url)}; check the path")
        yield from matches


def _places(url: str, indexes: dict[tuple[str, str], dict[str, Shard]]) -> list[tuple[str, str, str]]:
    """(prefix of the manifest's directory, pattern of names, suffix) of each directory that `url` refers to."""
    if is_remote(url):
        if url.endswith("/") and not url.startswith("pipe:"):
            return [(url, "*", "")]
        if (match := _REMOTE_SHARD.match(url)) is None:
            where = redact(url)
            raise ValueError(f"shards={where} names no shard; give a .tar file, or a directory that ends in a slash")
        return [(match["prefix"], match["name"], match["suffix"])]
    url = os.path.expanduser(url)
    is_tar = url.endswith(".tar") and not os.path.isdir(url)
    directory, name = os.path.split(url) if is_tar else (url.rstrip("/") or "/", "*")
    prefix = os.path.join(directory, "")
    if (prefix, "") in indexes or not _GLOB.search(directory) or os.path.isdir(directory):
        return [(prefix, name, "")]
    return [(os.path.join(hit, ""), name, "") for hit in sorted(glob.glob(directory)) if os.path.isdir(hit)]


def _select(
    prefix: str, name: str, suffix: str, pattern: str, indexes: dict[tuple[str, str], dict[str, Shard]]
) -> list[Shard]:
    if (prefix, suffix) not in indexes:
        if is_remote(prefix):
            data = fetch(f"{prefix}{MANIFEST}{suffix}", MAX_MANIFEST_BYTES)
        elif not os.path.isdir(prefix or "."):
            return []
        else:
            try:
                data = read_bytes(Path(prefix, MANIFEST), MAX_MANIFEST_BYTES)
            except FileNotFoundError:
                where = prefix or "."
                raise ValueError(f"shards={pattern}: {where} has no {MANIFEST}; {_way_out(prefix)}") from None
        indexes[prefix, suffix] = {shard.name: shard for shard in read_manifest(data, prefix, suffix).shards}
    shards = indexes[prefix, suffix]
    if name in shards:
        return [shards[name]]
    if not _GLOB.search(name):
        raise ValueError(
            f"shards={redact(pattern)}: {name} is not in {redact(prefix)}{MANIFEST}: it is missing, partial, or newer "
            f"than the manifest; {_way_out(prefix)}"
        )
    return [shard for key, shard in shards.items() if fnmatch.fnmatchcase(key, name)]


def _way_out(prefix: str) -> str:
    if is_remote(prefix):
        return "run python -m data_tools.index where the shards were written, and copy manifest.json and .idx to them"
    return f"run: python -m data_tools.index {prefix or '.'}"
