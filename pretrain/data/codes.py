"""The visual tokenizer's codes as pretrain.encode_images stored them: training reads them and runs no tokenizer.

A picture then has only `crops` looks (a look: one fixed crop, flip and jitter): epoch e uses look e mod crops. A look
depends only on the seed, the sample's key and the look's number. The key, unlike the sample's number, stays the same
when shards join a mix, leave it or change their order; and images and pairs of one directory share their codes.

00000.codes lies beside 00000.tar: a line of JSON that says which codes these are, then [samples, crops, patches] as
little-endian uint16, in the order of 00000.idx. A file of its own, not members of the tar, because then one `pread` at
a computed offset reads a code, another tokenizer or more crops need no new tar, and a tar member would cost 1 KiB per
sample on top of the 392 bytes per crop. `codes.json`, written last, lists the finished shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.random import Generator

from pretrain.data.shards.cache import ShardError, fetch, is_remote, redact
from pretrain.data.shards.manifest import Manifest
from pretrain.data.shards.open_files import Descriptor, OpenFiles
from pretrain.data.shards.reader import BadSample, ShardReader
from pretrain.data.shards.tar_index import ShardIndex
from pretrain.data.transforms import ImageTransform, sample_rng
from pretrain.json_files import parse_json, read_bytes, typed

VERSION = 1
DTYPE = np.dtype("<u2")
NO_CODE = 0xFFFF  # the picture could not be decoded
_MAX_HEAD, _MAX_SUMMARY = 2**16, 2**28
# The random stream of looks; those of a mix's kinds are 0, 1, 2, ...
_LOOKS = 2**32


def look_rng(seed: int, key: bytes, look: int) -> Generator:
    """The generator of one look at a picture; masks and draws use the sample's own generator."""
    number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
    return sample_rng(seed, look, number, _LOOKS)


@dataclass(frozen=True)
class Coding:
    """Everything that determines a picture's codes, besides the picture and its key."""

    tokenizer: str  # sha256 of the visual tokenizer's weights
    transform: dict[str, Any]  # as `plain` returns it
    seed: int
    crops: int
    patches: int

    @property
    def item_bytes(self) -> int:
        return self.crops * self.patches * DTYPE.itemsize

    def differences(self, other: Coding, owner: str) -> str:
        """How `other`, which is `owner`'s, differs, in words; "" if it does not."""
        mine, theirs = _flatten(self), _flatten(other)
        changed = [key for key in sorted(mine.keys() | theirs.keys()) if mine.get(key) != theirs.get(key)]
        return ", ".join(f"{key}={mine.get(key)} ({owner} has {theirs.get(key)})" for key in changed)


def plain(transform: ImageTransform) -> dict[str, Any]:
    """The fields of a transform that decide its crops in training, as they come back from JSON."""
    fields = asdict(transform)
    del fields["evaluation"]
    # Codes that were stored before a field existed lack it, and must still compare equal.
    if not fields["antialias"]:
        del fields["antialias"]
    for name in ("rand_augment", "erase", "cover"):
        if fields[name] == getattr(ImageTransform, name):
            del fields[name]
    return json.loads(json.dumps(fields))


def _flatten(coding: Coding) -> dict[str, Any]:
    fields = asdict(coding)
    return {f"transform.{key}": value for key, value in fields.pop("transform").items()} | fields


def file_heads(coding: Coding, index: ShardIndex) -> tuple[bytes, ...]:
    """The possible first lines of a shard's codes file; a file that begins otherwise holds other codes. The last one is
    that of files from before indexes had checksums."""
    return tuple(
        json.dumps({"version": VERSION} | place | {"coding": asdict(coding)}, sort_keys=True).encode() + b"\n"
        for known in dict.fromkeys((index.data, index.places))
        for place in ({"samples": index.samples, "index": hashlib.sha256(known).hexdigest()},)
    )


def summary(coding: Coding, shards: dict[str, int]) -> bytes:
    """The content of codes.json; `shards`: name of the tar -> its samples."""
    return json.dumps({"version": VERSION, "coding": asdict(coding), "shards": shards}, indent=1).encode() + b"\n"


def read_summary(data: bytes, where: str) -> tuple[Coding, dict[str, int]]:
    """Raises ValueError, naming `where`, if it is damaged or of another version."""
    try:
        content = parse_json(data)
        if (version := typed(content, "version", int)) != VERSION:
            raise ValueError(f"its version is {version}, not {VERSION}")
        coding, shards = Coding(**typed(content, "coding", dict)), typed(content, "shards", dict)
        return coding, {name: typed(shards, name, int) for name in shards}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} cannot be used ({error!r}); run python -m pretrain.encode_images again") from None


def stored_coding(manifest: Manifest, ending: str) -> Coding:
    """The coding of a source's stored codes. Raises ValueError if a shard has none, or its directories differ."""
    summaries: dict[str, tuple[Coding, dict[str, int]]] = {}
    for shard in manifest.shards:
        if (url := shard.beside(f"{ending}.json")) not in summaries:
            summaries[url] = read_summary(_small_file(url), redact(url))
        if summaries[url][1].get(shard.name) != shard.samples:
            raise ValueError(
                f"{redact(url)} has no codes for {shard.name} as it is now; run python -m pretrain.encode_images again "
                "on its directory"
            )
    (first, (coding, _)), *rest = summaries.items()
    for url, (other, _) in rest:
        if differences := other.differences(coding, redact(first)):
            raise ValueError(f"{redact(url)} holds other codes: {differences}; encode both with the same arguments")
    return coding


def _small_file(url: str) -> bytes:
    if is_remote(url):
        return fetch(url, _MAX_SUMMARY)
    try:
        return read_bytes(url, _MAX_SUMMARY)
    except OSError as error:
        raise ValueError(
            f"cannot read {url} ({error.strerror}); run python -m pretrain.encode_images on its directory, or "
            "remove `codes` from the source"
        ) from None


class StoredCodes:
    """Reads a picture's codes by (shard, sample); `reader` reads their shards. It may be forked or pickled."""

    def __init__(self, reader: ShardReader, ending: str):
        self.coding, self.ending = stored_coding(reader.manifest, ending), ending
        self._reader = reader
        # Shard -> (descriptor, or None for a remote file, whose local copy may be evicted; bytes before the codes)
        self._open = OpenFiles[int, tuple[Descriptor | None, int]]()

    def read(self, shard: int, sample: int, look: int) -> np.ndarray:
        """int64 [patches]. BadSample if the picture has none, ShardError if the file does not belong to this shard."""
        assert 0 <= look < self.coding.crops, (look, self.coding)
        file, start = self._codes_file(shard)
        handle = file or Descriptor(self._handle(shard))
        size = self.coding.patches * DTYPE.itemsize
        try:
            data = os.pread(handle.fd, size, start + (sample * self.coding.crops + look) * size)
        except OSError as error:
            raise ShardError(f"cannot read {self._url(shard)} ({error.strerror})") from None
        if len(data) != size:
            raise self._damaged(shard, "it is truncated")
        codes = np.frombuffer(data, DTYPE).astype(np.int64)
        if codes[0] == NO_CODE:
            raise BadSample("its picture could not be decoded when its codes were stored")
        return codes

    def _codes_file(self, shard: int) -> tuple[Descriptor | None, int]:
        return self._open.get_or_open(shard, lambda: self._open_codes(shard))

    def _open_codes(self, shard: int) -> tuple[Descriptor | None, int]:
        heads = file_heads(self.coding, index := self._reader.index(shard))
        file, head = Descriptor(self._handle(shard)), heads[0]
        if os.pread(file.fd, len(head), 0) not in heads:  # all of one length
            raise self._damaged(shard, "its first line does not match codes.json and the shard's index")
        if os.fstat(file.fd).st_size != len(head) + index.samples * self.coding.item_bytes:
            raise self._damaged(shard, "its size does not match its first line")
        remote = is_remote(self._reader.manifest.shards[shard].url)
        return (None if remote else file), len(head)

    def _handle(self, shard: int) -> int:
        return self._reader.open_beside(shard, self.ending, stamp=str(self.coding))

    def _url(self, shard: int) -> str:
        entry = self._reader.manifest.shards[shard]
        return redact(entry.beside(f"{entry.name.removesuffix('.tar')}.{self.ending}"))

    def _damaged(self, shard: int, reason: str) -> ShardError:
        return ShardError(f"cannot use {self._url(shard)}: {reason}; run python -m pretrain.encode_images again")


def check_coding(kind: str, stored: Coding, wanted: Coding) -> None:
    """Raises ValueError if the stored codes of one kind of the mix differ from those the run would compute itself."""
    if differences := stored.differences(wanted, "this run"):
        raise ValueError(
            f"mix.{kind}.codes: the stored codes have {differences}; run python -m pretrain.encode_images with this "
            "recipe and another --name, or set the recipe to those values"
        )
