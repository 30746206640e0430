"""What data_tools.rewrite will write: which samples of the old shards stand where in the new ones, and under what key.

A pure function of the shards, the drops and the settings. Input order is: directories as given, their shards by name,
the samples of a shard by key (img2dataset leaves them as they were downloaded, which no two runs repeat). Memory is
about 40 bytes a sample while the plan is made; then it lies on disk, 20 bytes a sample.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.shards.steps import Drop, read_drops
from data_tools.shards.writer import tar_bytes
from pretrain.data.shards.indexing import map_in_order
from pretrain.data.shards.tar_index import EXTENSIONS, ShardIndex, split_name, tar_members

# Where a sample lies: its tar, the line of the tar's .idx, and how many samples before it have the same key.
PLACE = np.dtype([("tar", "<u4"), ("line", "<u8"), ("length", "<u4"), ("copy", "<u4")])
_DASHES = re.compile(r"(-+)\d+$")


@dataclass(frozen=True)
class Plan:
    places: np.ndarray  # PLACE [kept], in the order of writing
    edges: list[int]  # new shard k holds places edges[k] to edges[k + 1]
    rows: int  # samples of the old shards
    dropped: Counter[str]
    duplicates: list[Drop]  # samples that a later one of the same name in their tar hides
    renamed: int
    dashes: str  # a later sample of the same key is called KEY + dashes + its number
    unused: int  # drops that name no sample
    others: Counter[str]  # members of other endings, which no reader knows, by ending
    schema: pa.Schema | None  # of the metadata; None: not every shard has a parquet that fits the others'


class _Job(NamedTuple):
    tar: int
    path: Path
    drops: np.ndarray  # uint64, hashes of keys, ascending
    reasons: list[str]


class _Scanned(NamedTuple):
    places: np.ndarray
    keys: np.ndarray  # uint64 hashes
    sizes: np.ndarray  # int64, what a sample takes in a tar
    dropped: Counter[str]
    duplicates: list[Drop]
    dashes: int
    others: Counter[str]
    schema: pa.Schema | None


def make_plan(
    tars: list[Path],
    drops: list[tuple[list[Path], list[Path]]],
    *,
    samples_per_shard: int | None,
    bytes_per_shard: int | None,
    shuffle_seed: int | None,
    workers: int,
) -> Plan:
    """`drops`: (files, the tars they speak of). Raises ValueError if the drops name no sample, or all."""
    found, reasons = _drops(tars, drops)
    numbers, hashes, which = found
    edges = np.searchsorted(numbers, np.arange(len(tars) + 1))
    jobs = [
        _Job(k, path, hashes[a:b], [reasons[i] for i in which[a:b]])
        for k, (path, a, b) in enumerate(zip(tars, edges[:-1], edges[1:], strict=True))
    ]
    with map_in_order(_scan, jobs, workers) as results:
        scanned = list(results)
    dropped = sum((part.dropped for part in scanned), Counter[str]())
    unused = len(hashes) - dropped.total()
    if len(hashes) and not dropped:
        raise ValueError(
            f"none of the {len(hashes)} drops names a sample of these shards; give the drops that were made of them"
        )
    duplicates = [drop for part in scanned for drop in part.duplicates]
    dropped["duplicate_key"] += len(duplicates)
    places = np.concatenate([part.places for part in scanned])
    if not len(places):
        raise ValueError(f"nothing is left to write: {dropped.total()} samples, and all of them are dropped")
    places["copy"] = _copies(np.concatenate([part.keys for part in scanned]))
    sizes = np.concatenate([part.sizes for part in scanned])
    if shuffle_seed is not None:
        # The raw words: unlike numpy's own permutations they are promised to stay the same.
        order = np.argsort(np.random.Philox(key=shuffle_seed).random_raw(len(places)), kind="stable")
        places, sizes = places[order], sizes[order]
    return Plan(
        places,
        _edges(sizes, samples_per_shard, bytes_per_shard),
        len(places) + dropped.total(),
        +dropped,
        duplicates,
        int(np.count_nonzero(places["copy"])),
        "-" * (1 + max(part.dashes for part in scanned)),
        unused,
        sum((part.others for part in scanned), Counter[str]()),
        _common_schema([part.schema for part in scanned]),
    )


def key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "little")


def _drops(
    tars: list[Path], drops: list[tuple[list[Path], list[Path]]]
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[str]]:
    """((number of the tar or past the last one, hash of the key, number of the reason), each sorted by the first two;
    reasons). Of several drops of one sample the first counts."""
    number = {path: k for k, path in enumerate(tars)}
    reasons: dict[str, int] = {}
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    for files, theirs in drops:
        known = {path.stem: number[path] for path in theirs}
        for drop in read_drops(files):
            columns[0].append(known.get(drop.shard, len(tars)))
            columns[1].append(key_hash(drop.key))
            columns[2].append(reasons.setdefault(drop.reason, len(reasons)))
    shard, key, why = (np.array(c, t) for c, t in zip(columns, (np.int64, np.uint64, np.int64), strict=True))
    order = np.lexsort((key, shard))
    shard, key, why = shard[order], key[order], why[order]
    again = (np.diff(shard) == 0) & (np.diff(key) == 0) if len(key) else np.zeros(0, bool)
    first = np.concatenate([[True], ~again])[: len(key)]
    return (shard[first], key[first], why[first]), list(reasons)


def _scan(job: _Job) -> _Scanned:
    """One shard's samples by key, without those that are dropped."""
    index_path = job.path.with_suffix(".idx")
    index = ShardIndex(index_path.read_bytes(), str(index_path))
    ends = np.flatnonzero(np.frombuffer(index.data, np.uint8) == ord("\n"))
    keys = [index.key(sample) for sample in range(index.samples)]
    hashes = np.fromiter((key_hash(key) for key in keys), np.uint64, len(keys))
    kept, dropped = [], Counter[str]()
    for sample in sorted(range(len(keys)), key=keys.__getitem__):
        at = int(np.searchsorted(job.drops, hashes[sample]))
        if at < len(job.drops) and job.drops[at] == hashes[sample]:
            dropped[job.reasons[at]] += 1
        else:
            kept.append(sample)
    places = np.zeros(len(kept), PLACE)
    places["tar"], places["line"] = job.tar, ends[kept] + 1
    places["length"] = ends[np.array(kept, np.int64) + 1] - ends[kept] - 1
    sizes = [sum(tar_bytes(member.size) for member in index.members(sample)) for sample in kept]
    dashes = max((len(match[1]) for key in keys if (match := _DASHES.search(key))), default=0)
    duplicates, others = _hidden(job.path)
    return _Scanned(
        places, hashes[kept], np.array(sizes, np.int64), dropped, duplicates, dashes, others, _schema_of(job.path)
    )


def _hidden(path: Path) -> tuple[list[Drop], Counter[str]]:
    """What the index of a shard does not show: samples that a later one of the same name hides, and endings that no
    reader knows."""
    seen: Counter[str] = Counter()
    others: Counter[str] = Counter()
    hidden: Counter[str] = Counter()
    for member in tar_members(path):
        key, extension = split_name(member.name)
        if not key or extension not in EXTENSIONS or not member.isreg() or member.issparse():
            others[extension] += member.isreg()
            continue
        seen[member.name] += 1
        hidden[key] = max(hidden[key], seen[member.name] - 1)
    shown = {key.encode(errors="surrogateescape").decode(errors="backslashreplace"): n for key, n in hidden.items()}
    return [
        Drop(path.stem, key, "duplicate_key", f"a later sample of {path} has the same name")
        for key, count in shown.items()
        for _ in range(count)
    ], +others


def _copies(keys: np.ndarray) -> np.ndarray:
    """How many of the same key stand before each, [n]."""
    order = np.argsort(keys, kind="stable")
    begins = np.concatenate([[True], np.diff(keys[order]) != 0])
    first = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
    copies = np.empty(len(keys), np.int64)
    copies[order] = np.arange(len(keys)) - first
    return copies


def _edges(sizes: np.ndarray, samples_per_shard: int | None, bytes_per_shard: int | None) -> list[int]:
    """As few shards as the limit allows, all of one size."""
    if bytes_per_shard is None:
        assert samples_per_shard is not None
        shards = -(-len(sizes) // samples_per_shard)
        return [k * len(sizes) // shards for k in range(shards + 1)]
    ends = np.cumsum(sizes)
    shards = -(-int(ends[-1]) // bytes_per_shard)
    marks = [k * int(ends[-1]) // shards for k in range(1, shards)]
    return sorted({0, len(sizes), *np.searchsorted(ends, marks, side="right").tolist()})


def _schema_of(tar: Path) -> pa.Schema | None:
    try:
        return pq.read_schema(tar.with_suffix(".parquet")).remove_metadata()
    except FileNotFoundError:
        return None
    except pa.ArrowInvalid as error:
        path = tar.with_suffix(".parquet")
        raise ValueError(f"{path} cannot be read ({str(error).splitlines()[0]}); restore it, or remove it") from None


def _common_schema(schemas: Iterable[pa.Schema | None]) -> pa.Schema | None:
    known = list(dict.fromkeys(schemas))
    if None in known:
        return None
    try:
        return pa.unify_schemas(known, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
