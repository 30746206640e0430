"""The plan of data_tools.rewrite: the place of each sample of the old shards in the new ones, and its key.

A pure function of the shards, the drops and the settings. The order of the input is: directories as given, their shards
by name, the samples of a shard by key (img2dataset's order is that of the downloads, which differs between runs).
Making the plan takes about 40 bytes of memory per sample; on disk it has 20 bytes per sample.
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
from pretrain.data.shards.left_out import count
from pretrain.data.shards.tar_index import ShardIndex, shard_parts
from pretrain.files import open_regular

# The place of a sample: its tar, its line in the tar's .idx, and how many earlier samples have the same key.
PLACE = np.dtype([("tar", "<u4"), ("line", "<u8"), ("length", "<u4"), ("copy", "<u4")])
KEY = "key"  # the column of a shard's parquet
_DASHES = re.compile(r"(-+)\d+$")


@dataclass(frozen=True)
class Plan:
    places: np.ndarray  # PLACE [kept], in the order of writing
    edges: list[int]  # new shard k has the places edges[k] to edges[k + 1]
    rows: int  # samples of the old shards
    dropped: Counter[str]
    duplicates: list[Drop]  # samples that a later one with the same name in their tar replaces
    renamed: int
    dashes: str  # a later sample with the same key is renamed to KEY + dashes + number
    unused: int  # drops that match no sample
    others: Counter[str]  # members that belong to no sample, by reason
    schema: pa.Schema | None  # of the metadata; None: some shard has no parquet, or an incompatible one


class _Job(NamedTuple):
    tar: int
    path: Path
    drops: np.ndarray  # uint64, hashes of keys, ascending
    reasons: list[str]


class _ShardPlan(NamedTuple):
    places: np.ndarray
    keys: np.ndarray  # uint64 hashes
    sizes: np.ndarray  # int64, bytes of a sample in a tar
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
    """`drops`: (files, the tars they refer to). Raises ValueError if the drops match no sample, or all samples."""
    (numbers, hashes, which), reasons = _drops(tars, drops)
    edges = np.searchsorted(numbers, np.arange(len(tars) + 1))
    jobs = [
        _Job(k, path, hashes[a:b], [reasons[i] for i in which[a:b]])
        for k, (path, a, b) in enumerate(zip(tars, edges[:-1], edges[1:], strict=True))
    ]
    with map_in_order(_scan, jobs, workers) as results:
        shard_plans = list(results)
    dropped = sum((part.dropped for part in shard_plans), Counter[str]())
    unused = len(hashes) - dropped.total()
    if len(hashes) and not dropped:
        raise ValueError(
            f"none of the {len(hashes)} drops names a sample of these shards; give drops that were made for them"
        )
    duplicates = [drop for part in shard_plans for drop in part.duplicates]
    dropped["duplicate_key"] += len(duplicates)
    places = np.concatenate([part.places for part in shard_plans])
    if not len(places):
        raise ValueError(f"no sample remains: all {dropped.total()} are dropped; give fewer drops")
    places["copy"] = _copies(np.concatenate([part.keys for part in shard_plans]))
    sizes = np.concatenate([part.sizes for part in shard_plans])
    if shuffle_seed is not None:
        # Raw words, because only these are guaranteed to be the same in every numpy version.
        order = np.argsort(np.random.Philox(key=shuffle_seed).random_raw(len(places)), kind="stable")
        places, sizes = places[order], sizes[order]
    return Plan(
        places,
        _edges(sizes, samples_per_shard, bytes_per_shard),
        len(places) + dropped.total(),
        +dropped,
        duplicates,
        int(np.count_nonzero(places["copy"])),
        "-" * (1 + max(part.dashes for part in shard_plans)),
        unused,
        sum((part.others for part in shard_plans), Counter[str]()),
        _common_schema([part.schema for part in shard_plans]),
    )


def key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(errors="replace"), digest_size=8).digest(), "little")


def _drops(
    tars: list[Path], drops: list[tuple[list[Path], list[Path]]]
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], list[str]]:
    """((number of the tar, or len(tars) if it is not among them; hash of the key; number of the reason), each sorted by
    the first two; reasons). Of several drops of one sample the first counts."""
    number = {path: k for k, path in enumerate(tars)}
    reasons: dict[str, int] = {}
    columns: tuple[list[int], list[int], list[int]] = ([], [], [])
    for files, theirs in drops:
        numbers = {path.stem: number[path] for path in theirs}
        for drop in read_drops(files):
            columns[0].append(numbers.get(drop.shard, len(tars)))
            columns[1].append(key_hash(drop.key))
            columns[2].append(reasons.setdefault(drop.reason, len(reasons)))
    shard, key, why = (np.array(c, t) for c, t in zip(columns, (np.int64, np.uint64, np.int64), strict=True))
    order = np.lexsort((key, shard))
    shard, key, why = shard[order], key[order], why[order]
    repeats = (np.diff(shard) == 0) & (np.diff(key) == 0) if len(key) else np.zeros(0, bool)
    first = np.concatenate([[True], ~repeats])[: len(key)]
    return (shard[first], key[first], why[first]), list(reasons)


def _scan(job: _Job) -> _ShardPlan:
    """One shard's samples by key, without the dropped ones."""
    index_path = job.path.with_suffix(".idx")
    index = ShardIndex(index_path.read_bytes(), str(index_path))
    ends = np.flatnonzero(np.frombuffer(index.data, np.uint8) == ord("\n"))
    keys = [index.key(sample) for sample in range(index.samples)]
    hashes = np.fromiter((key_hash(key) for key in keys), np.uint64, len(keys))
    remaining, dropped = [], Counter[str]()
    for sample in sorted(range(len(keys)), key=keys.__getitem__):
        at = int(np.searchsorted(job.drops, hashes[sample]))
        if at < len(job.drops) and job.drops[at] == hashes[sample]:
            dropped[job.reasons[at]] += 1
        else:
            remaining.append(sample)
    places = np.zeros(len(remaining), PLACE)
    places["tar"], places["line"] = job.tar, ends[remaining] + 1
    places["length"] = ends[np.array(remaining, np.int64) + 1] - ends[remaining] - 1
    sizes = [sum(tar_bytes(member.size) for member in index.members(sample)) for sample in remaining]
    dashes = max((len(match[1]) for key in keys if (match := _DASHES.search(key))), default=0)
    duplicates, others = _outside_index(job.path)
    return _ShardPlan(
        places, hashes[remaining], np.array(sizes, np.int64), dropped, duplicates, dashes, others, _schema_of(job.path)
    )


def _outside_index(path: Path) -> tuple[list[Drop], Counter[str]]:
    """What is in a tar but not in its index: samples that a later one with the same name replaces, and members that
    belong to no sample, by reason."""
    occurrences: Counter[tuple[str, str]] = Counter()
    others: Counter[str] = Counter()
    duplicates: Counter[str] = Counter()
    for key, extension, _, reason in shard_parts(path):
        if reason:
            count(others, reason)
            continue
        occurrences[key, extension] += 1
        duplicates[key] = max(duplicates[key], occurrences[key, extension] - 1)
    printable = {
        key.encode(errors="surrogateescape").decode(errors="backslashreplace"): n for key, n in duplicates.items()
    }
    return [
        Drop(path.stem, key, "duplicate_key", f"a later sample of {path} has the same name")
        for key, number in printable.items()
        for _ in range(number)
    ], +others


def _copies(keys: np.ndarray) -> np.ndarray:
    """For each key the number of equal ones before it, [n]."""
    order = np.argsort(keys, kind="stable")
    begins = np.concatenate([[True], np.diff(keys[order]) != 0])
    first = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
    copies = np.empty(len(keys), np.int64)
    copies[order] = np.arange(len(keys)) - first
    return copies


def _edges(sizes: np.ndarray, samples_per_shard: int | None, bytes_per_shard: int | None) -> list[int]:
    """The edges of as few shards as the limit allows, all about equal in size."""
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
        with open_regular(tar.with_suffix(".parquet")) as file:
            schema = pq.read_schema(file).remove_metadata()
    except FileNotFoundError:
        return None
    except pa.ArrowException as error:
        path = tar.with_suffix(".parquet")
        raise ValueError(f"cannot read {path} ({str(error).splitlines()[0]}); restore it, or remove it") from None
    at = schema.get_field_index(KEY)  # the new rows are called as their samples are, also where these were numbers
    return schema if at < 0 else schema.set(at, pa.field(KEY, pa.string()))


def _common_schema(schemas: Iterable[pa.Schema | None]) -> pa.Schema | None:
    distinct = list(dict.fromkeys(schemas))
    if None in distinct:
        return None
    try:
        return pa.unify_schemas(distinct, promote_options="permissive")
    except pa.ArrowException:
        return None
