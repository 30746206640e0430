"""Writes one new shard of data_tools.rewrite, from samples of any old shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.pictures.recode import Recode, with_facts
from data_tools.shards.rewrite_plan import KEY
from data_tools.shards.steps import Drop, write_drops
from data_tools.shards.writer import ShardWriter
from pretrain.data.shards.indexing import stats_path
from pretrain.data.shards.open_files import Descriptor, OpenFiles
from pretrain.data.shards.reader import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, BadSample, ShardError
from pretrain.data.shards.tar_index import EXTENSIONS, IMAGE_EXTENSIONS, VERSION, Member, ShardIndex
from pretrain.files import open_regular

MAX_DIGITS = 18  # of a number of 64 bits

_Files = OpenFiles[str, Descriptor]  # two per shard: its tar and its index


class NewShard(NamedTuple):
    """One shard to write: the places `first` to `last` of WORK/places.npy."""

    out: Path
    work: Path
    number: int
    first: int
    last: int
    tars: tuple[str, ...]  # the old ones
    dashes: str
    recode: Recode

    @property
    def drops(self) -> Path:
        """The samples that could not be written; this file is written before the shard is finished."""
        return self.work / f"{self.number:05d}.left.parquet"

    @property
    def is_done(self) -> bool:
        if not self.drops.exists():
            return False
        whole = stats_path(self.out / f"{self.number:05d}.tar").exists()
        return whole or pq.read_metadata(self.drops).num_rows == self.last - self.first


class _Sample(NamedTuple):
    tar: int
    key: str
    copy: int
    members: list[Member]


def write_shard(job: NewShard) -> NewShard:
    """Raises ShardError for a tar that does not match its index, ValueError for a broken parquet."""
    places = np.load(job.work / "places.npy", mmap_mode="r")[job.first : job.last]
    files = _Files()
    samples = [_sample(files, job, place) for place in places]
    rows = _rows(job, samples)
    drops: list[Drop] = []
    with ShardWriter(job.out, samples_per_shard=len(samples), first=job.number, schema=_schema(job)) as writer:
        for sample in samples:
            try:
                members, facts = job.recode.members(_read(files, job, sample))
            except BadSample as error:
                path = Path(job.tars[sample.tar])
                drops.append(Drop(path.stem, sample.key, _reason(error), f"{path.parent}: {error}"))
                continue
            key = f"{sample.key}{job.dashes}{sample.copy}" if sample.copy else sample.key
            if key != sample.key:
                facts[KEY] = key
            if facts and "json" in members:
                members["json"] = with_facts(members["json"], facts)
            row = rows.get((sample.tar, sample.key))
            writer.write(key, members, None if row is None else _update(row, facts))
        write_drops(job.drops, drops)
    return job


def _update(row: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Replaces only values of the same type, so that the columns keep their types."""
    return {
        name: facts[name] if name in facts and isinstance(facts[name], type(value)) else value
        for name, value in row.items()
    }


class _TooLarge(BadSample):
    pass


def _reason(error: BadSample) -> str:
    return "member_too_large" if isinstance(error, _TooLarge) else "undecodable"


def _sample(files: _Files, job: NewShard, place: np.void) -> _Sample:
    tar = int(place["tar"])
    index = Path(job.tars[tar]).with_suffix(".idx")
    line = _read_at(files, str(index), int(place["line"]), int(place["length"]))
    parsed = ShardIndex(VERSION + b" 1\n" + line + b"\n", str(index))
    return _Sample(tar, parsed.key(0), int(place["copy"]), parsed.members(0))


def _read(files: _Files, job: NewShard, sample: _Sample) -> dict[str, bytes]:
    """The members, in the same order for all samples, whatever their order in the tar."""
    members = {}
    for member in sorted(sample.members, key=lambda member: EXTENSIONS.index(member.extension)):
        limit = MAX_IMAGE_BYTES if member.extension in IMAGE_EXTENSIONS else MAX_TEXT_BYTES
        if member.size > limit:
            raise _TooLarge(f"its {member.extension} has {member.size} bytes; the limit is {limit}")
        members[member.extension] = _read_at(files, job.tars[sample.tar], member.offset, member.size)
    return members


def _read_at(files: _Files, path: str, offset: int, size: int) -> bytes:
    data = os.pread(files.get_or_open(path, lambda: Descriptor(path)).fd, size, offset)
    if len(data) != size:
        raise ShardError(f"{path} ends before byte {offset + size}; run python -m data_tools.index again")
    return data


def _rows(job: NewShard, samples: list[_Sample]) -> dict[tuple[int, str], dict[str, Any]]:
    """(tar, key) -> the sample's row in the parquet of its old shard, if there is one."""
    wanted: dict[int, list[str]] = {}
    for sample in samples:
        wanted.setdefault(sample.tar, []).append(sample.key)
    return {
        (tar, row[KEY]): row
        for tar, keys in wanted.items()
        for row in _rows_of(Path(job.tars[tar]).with_suffix(".parquet"), keys)
    }


def _rows_of(path: Path, keys: list[str]) -> Iterator[dict[str, Any]]:
    try:
        with open_regular(path) as file:
            table = pq.ParquetFile(file).read()
        if KEY not in table.column_names:
            return
        column, names = _keys(table[KEY], keys)
        table = table.set_column(table.column_names.index(KEY), KEY, column)
        rows = table.filter(pc.is_in(column, value_set=pa.array(list(names), column.type))).to_pylist()
    except FileNotFoundError:
        return
    except (pa.ArrowException, KeyError, OSError) as error:
        raise ValueError(f"cannot read {path} ({str(error).splitlines()[0]}); restore it, or remove it") from None
    yield from (row | {KEY: names[row[KEY]]} for row in rows)


def _keys(column: pa.ChunkedArray, keys: list[str]) -> tuple[pa.ChunkedArray, dict[Any, str]]:
    """A key column, and what it calls the samples `keys`. Whoever rewrites a table by pandas makes 12 of 000012."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        numbers = {int(key): key for key in keys if key.isascii() and key.isdigit() and len(key) <= MAX_DIGITS}
        return column.cast(pa.int64()), numbers
    return column.cast(pa.string()), {key: key for key in keys}


def _schema(job: NewShard) -> pa.Schema | None:
    path = job.work / "rows.schema"
    return _read_schema(str(path)) if path.exists() else None


@lru_cache(maxsize=4)
def _read_schema(path: str) -> pa.Schema:
    return pq.read_schema(path)
