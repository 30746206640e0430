"""One slice of a download: its part of the list as canonical parquet, its shard numbers, and the outcome of each row.

DIR/list/00000-of-00004/     the rows of the slice, as img2dataset reads them, and list.json
DIR/download/plan.json       the settings of all slices
DIR/download/00000-of-00004/ log.txt, unfinished shards, and done.json when the slice is done
DIR/00012.tar .parquet _stats.json    finished shards; no two slices share a number
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.fetch.reasons import SUCCESS, reason_of
from data_tools.lists.reading import List
from data_tools.ownership import owned
from pretrain.files import beside, move, sync, write_json
from pretrain.json_files import parse_json, read_bytes, read_fields

WORK = "download"
_PART_ROWS = 200_000  # per parquet file of the list; img2dataset loads one at a time


@dataclass(frozen=True)
class Slice:
    """The I-th of N contiguous slices of a list."""

    out: Path
    number: int
    slices: int
    samples_per_shard: int

    @property
    def name(self) -> str:
        return f"{self.number:05d}-of-{self.slices:05d}"

    @property
    def list(self) -> Path:
        return self.out / "list" / self.name

    @property
    def work(self) -> Path:
        return self.out / WORK / self.name

    @property
    def done(self) -> Path:
        return self.work / "done.json"

    def shards(self, rows: int) -> range:
        """The numbers that this slice's shards may have, in a list of `rows` rows. No two slices share a shard."""
        shards = -(-rows // self.samples_per_shard)
        return range(self.number * shards // self.slices, (self.number + 1) * shards // self.slices)


@dataclass(frozen=True)
class ListedRows:
    """The slice's part of the list: the content of list.json."""

    rows: int
    kept: int
    dropped: dict[str, int]
    first: int  # number of the first shard
    digits: int  # of a shard's number


_LISTED = {"rows": int, "kept": int, "dropped": dict, "first": int, "digits": int}


@dataclass(frozen=True)
class SliceShards:
    """The shards of a slice: their numbers, their rows of the list, and which of them are in DIR."""

    part: Slice
    listed: ListedRows
    # Shards in DIR that are made again. Until the new one is whole, the old one stays; `kept`: it was better.
    repeated: set[int] = field(default_factory=set)
    kept: set[int] = field(default_factory=set)

    @property
    def numbers(self) -> range:
        first = self.listed.first
        return range(first, first + -(-self.listed.kept // self.part.samples_per_shard))

    def rows_of(self, shard: int) -> int:
        size = self.part.samples_per_shard
        return min(size, self.listed.kept - (shard - self.listed.first) * size)

    def path(self, shard: int, ending: str, directory: Path | None = None) -> Path:
        """A shard's file in DIR, or in another directory."""
        return (directory or self.part.out) / f"{shard:0{self.listed.digits}d}{ending}"

    def published(self) -> list[int]:
        endings = (".tar", ".parquet", "_stats.json")
        whole = (shard for shard in self.numbers if all(self.path(shard, ending).exists() for ending in endings))
        return [shard for shard in whole if shard not in self.repeated]

    def repeat(self, wanted: Callable[[str | None], bool]) -> int:
        """Lets the published shards be made again that have a row whose error message is `wanted`. -> their number."""
        for shard in self.published():
            messages = _read_columns(self.path(shard, ".parquet"), "error_message")["error_message"]
            if any(map(wanted, messages.unique().to_pylist())):
                self.repeated.add(shard)
        return len(self.repeated)

    def missing(self) -> list[int]:
        return sorted({*self.numbers} - {*self.published()})

    def counts(self) -> Counter[str]:
        """The outcome of the rows of the published shards."""
        return sum((account(self.path(shard, ".parquet")) for shard in self.published()), Counter[str]())

    def remove_incomplete(self) -> None:
        """Removes the remaining files of missing shards: `publish` was interrupted, or a user removed a file."""
        for shard in {*self.missing()} - self.repeated:
            for ending in ("_stats.json", ".parquet", ".tar", ".idx"):
                self.path(shard, ending).unlink(missing_ok=True)

    def publish(self, attempt: Path) -> Counter[str]:
        """Moves the finished shards of an attempt to DIR, each with its _stats.json last. A shard with missing rows is
        not moved, so it is made again; nor is a repeated one with fewer pictures than before. -> the outcome of the
        rows of these shards."""
        counts: Counter[str] = Counter()
        for stats in sorted(attempt.glob("*_stats.json")):
            shard = int(stats.name.removesuffix("_stats.json"))
            tables = (self.path(shard, ".parquet", attempt), self.path(shard, ".parquet"))
            try:
                parse_json(read_bytes(stats))
                rows = account(next(path for path in tables if path.exists()))
            except (ValueError, StopIteration):  # it is being written, or the worker was killed while writing it
                continue
            if rows.total() != self.rows_of(shard):
                continue
            if shard in self.repeated:
                self.repeated.discard(shard)
                before = account(self.path(shard, ".parquet"))
                if rows[SUCCESS] < before[SUCCESS]:  # servers that are down, or gone since
                    self.kept.add(shard)
                    stats.unlink()
                    counts += before
                    continue
            for ending in (".tar", ".parquet", "_stats.json"):
                if (source := self.path(shard, ending, attempt)).exists():
                    move(source, self.path(shard, ending))
            counts += rows
        return counts


def write_list(rows: List, part: Slice) -> SliceShards:
    """Writes the canonical rows of the slice, unless they exist. They appear all at once."""
    record = part.list / "list.json"
    if record.exists():
        content = read_fields(record, _LISTED, f"remove {part.list}, and the slice of the list is written again")
        return SliceShards(part, ListedRows(**{name: content[name] for name in _LISTED}))
    # Only slices need the number of rows, which costs a pass over a text file.
    numbers = part.shards(rows.rows) if part.slices > 1 else None
    first, stop = (0, None) if numbers is None else (numbers.start, numbers.stop)
    growing = beside(part.list)
    shutil.rmtree(growing, ignore_errors=True)
    growing.mkdir(parents=True)
    read = rows.batches(
        first=first * part.samples_per_shard, stop=None if stop is None else stop * part.samples_per_shard
    )
    kept = 0
    for number, table in enumerate(_parts(read, part.samples_per_shard)):
        path = growing / f"{number:05d}.parquet"
        pq.write_table(table, path)
        sync(path)
        kept += table.num_rows
    shards = -(-(rows.rows if part.slices > 1 else kept) // part.samples_per_shard)
    dropped = dict(sorted(rows.dropped.items()))
    listed = ListedRows(kept + sum(dropped.values()), kept, dropped, first, max(5, len(str(max(0, shards - 1)))))
    write_json(growing / "list.json", vars(listed))
    shutil.rmtree(part.list, ignore_errors=True)
    move(growing, part.list)
    return SliceShards(part, listed)


def _parts(batches: Iterator[pa.RecordBatch], samples_per_shard: int) -> Iterator[pa.Table]:
    """Tables that each contain a whole number of shards, except the last."""
    size = samples_per_shard * max(1, _PART_ROWS // samples_per_shard)
    pending: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        while batch.num_rows:
            pending.append(batch.slice(0, size - count))
            batch = batch.slice(pending[-1].num_rows)
            count += pending[-1].num_rows
            if count == size:
                yield pa.Table.from_batches(pending)
                pending, count = [], 0
    if pending:
        yield pa.Table.from_batches(pending)


def owned_slice(part: Slice, plan: dict[str, Any]) -> AbstractContextManager:
    """Reserves the slice for this process; `plan` are the settings of all slices of DIR. Raises ValueError if DIR
    contains something else, or another process is making this slice."""
    return owned(
        part.out,
        plan,
        stamp=part.out / WORK / "plan.json",
        work=part.work,
        has_other_files=lambda: any(part.out.glob("*.tar")),
    )


def account(parquet: Path) -> Counter[str]:
    """The outcome of a shard's rows: success, or the reason. Raises ValueError for an incomplete file."""
    table = _read_columns(parquet, "status", "error_message")
    counts: Counter[str] = Counter()
    for group in table.group_by(["status", "error_message"]).aggregate([([], "count_all")]).to_pylist():
        reason = SUCCESS if group["status"] == SUCCESS else reason_of(group["error_message"] or "no message")
        counts[reason] += group["count_all"]
    return counts


def _read_columns(parquet: Path, *columns: str) -> pa.Table:
    try:
        return pq.read_table(parquet, columns=list(columns), partitioning=None).select(columns)
    except (pa.ArrowInvalid, pa.ArrowKeyError, KeyError, OSError) as error:
        raise ValueError(f"cannot read {parquet} ({str(error).splitlines()[0]})") from None
