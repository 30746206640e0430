"""Reads what an audit needs of one shard: its tar's headers and captions, and its parquet with the failed rows."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.audit_page.sketches import RandomSample, lot
from data_tools.fetch.reasons import SUCCESS, reason_of
from data_tools.pictures.hashes import caption_hash
from data_tools.shards.samples import samples_of
from pretrain.data.decoding import read_header
from pretrain.data.shards.reader import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, BadSample
from pretrain.data.shards.tar_index import IMAGE_EXTENSIONS, Member

CAPTION_CHARS = 300  # of a caption on the page
COUNTED_CHARS = 2000  # of a caption, for counting its words
LANGUAGE_SAMPLES = 2000  # captions of one shard whose language may be detected
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SERVER = re.compile(r"^https?://(?:[^/?#@\\]*@)?([^/?#:\\]+)", re.IGNORECASE)
_COLUMNS = ("key", "status", "error_message", "url", "width", "height", "sha256")


class Place(NamedTuple):
    """The place of a sample's picture, and its caption."""

    tar: str
    key: str
    offset: int
    size: int  # 0: the sample has no picture
    caption: str


class Job(NamedTuple):
    tar: Path
    seed: int
    wall: int  # samples to draw
    wanted: frozenset[str]  # keys whose places are needed


@dataclass
class ShardFacts:
    samples: int = 0
    tar_bytes: int = 0
    unreadable: int = 0  # pictures whose header cannot be read
    rows: int | None = None  # of the parquet, None without one
    failures: Counter[str] = field(default_factory=Counter)  # reason -> rows
    server_successes: Counter[str] = field(default_factory=Counter)  # server -> rows
    server_failures: Counter[str] = field(default_factory=Counter)  # server -> rows
    formats: Counter[str] = field(default_factory=Counter)
    vocabulary: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    sizes: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # [pictures, (width, height)]
    picture_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    words: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # of each caption
    picture_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    caption_hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    wall: RandomSample = field(default_factory=lambda: RandomSample(0))  # Places
    texts: RandomSample = field(default_factory=lambda: RandomSample(LANGUAGE_SAMPLES))  # captions
    places: dict[str, Place] = field(default_factory=dict)  # of the wanted keys


def read_shard(job: Job) -> ShardFacts:
    """Raises ShardError for a truncated tar, ValueError for a damaged parquet, naming it."""
    facts = ShardFacts(tar_bytes=job.tar.stat().st_size, wall=RandomSample(job.wall))
    rows = _read_parquet(job.tar.with_suffix(".parquet"), facts)
    sizes, lengths, words, pictures, captions = [], [], [], [], []
    with open(job.tar, "rb") as file:
        for sample in samples_of(job.tar):
            facts.samples += 1
            key, picture = sample.key, sample.picture
            text = _text(file, sample.members["txt"]) if "txt" in sample.members else None
            facts.formats.update(extension for extension in sample.members if extension in IMAGE_EXTENSIONS)
            where = (picture.offset, picture.size) if picture is not None else (0, 0)
            place = Place(str(job.tar), key, *where, (text or "")[:CAPTION_CHARS])
            random_number = lot(job.seed, job.tar.stem, key)
            facts.wall.add(random_number, f"{job.tar}\0{key}", place)
            if key in job.wanted:
                facts.places[key] = place
            if text is not None:
                digest, number = caption_hash(text)
                words.append(number)
                captions.append(digest)
                facts.vocabulary.update(_WORD.findall(text[:COUNTED_CHARS].lower()))
                facts.captions[" ".join(text.split())[:CAPTION_CHARS]] += 1
                facts.texts.add(random_number, key, text[:COUNTED_CHARS])
            if picture is not None:
                lengths.append(picture.size)
                size, digest = _size_and_hash(rows.get(key, {}), file, picture)
                pictures.append(digest)
                sizes += [size] if size else []
                facts.unreadable += size is None
    facts.sizes = np.array(sizes, np.int64).reshape(-1, 2)
    facts.picture_bytes, facts.words = np.array(lengths, np.int64), np.array(words, np.int64)
    facts.picture_hashes, facts.caption_hashes = np.array(pictures, np.uint64), np.array(captions, np.uint64)
    return facts


def _text(file: BinaryIO, member: Member) -> str:
    """A caption, or its beginning if it is too long for training: the page shows such captions too."""
    file.seek(member.offset)
    return file.read(min(member.size, MAX_TEXT_BYTES)).decode(errors="replace")


def _size_and_hash(row: dict[str, Any], file: BinaryIO, picture: Member) -> tuple[tuple[int, int] | None, int]:
    """(width and height, None if unknown; 64 bits of a hash): from the parquet, otherwise from the picture."""
    width, height, digest = row.get("width"), row.get("height"), row.get("sha256")
    has_size = isinstance(width, int) and isinstance(height, int) and width > 0 and height > 0
    if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) and has_size:
        return (width, height), int(digest[:16], 16)  # type: ignore[return-value]
    if picture.size > MAX_IMAGE_BYTES:
        return None, picture.offset  # counts as unique
    file.seek(picture.offset)
    data = file.read(picture.size)
    try:
        header = read_header(data)
        size = header.width, header.height
    except BadSample:
        size = None
    return size, int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _read_parquet(path: Path, facts: ShardFacts) -> dict[str, dict[str, Any]]:
    """Counts the rows and the failures. -> the rows of the downloaded samples, by key."""
    if not path.exists():
        return {}
    facts.rows, rows = 0, {}
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            for batch in file.iter_batches(columns=columns):
                facts.rows += len(batch)
                for row in batch.to_pylist():
                    rows.update(_count(row, facts))
    except (pa.ArrowException, OSError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"{path} is damaged ({first}); download its shard again, or remove the file") from None
    return rows


def _count(row: dict[str, Any], facts: ShardFacts) -> dict[str, dict[str, Any]]:
    server = server_of(row.get("url"))
    if row.get("status", SUCCESS) == SUCCESS:
        facts.server_successes[server] += 1
        return {str(row.get("key")): row}
    facts.server_failures[server] += 1
    facts.failures[reason_of(row.get("error_message") or str(row["status"]))] += 1
    return {}


def server_of(url: object) -> str:
    """The server's name in lower case; "" for anything but a URL."""
    match = _SERVER.match(url) if isinstance(url, str) else None
    return match[1].lower()[:120] if match else ""
