"""One slice of a download: its part of the list as canonical parquet, its shard numbers, and what became of each row.

DIR/list/00000-of-00004/     the rows of the slice, as img2dataset reads them, and list.json
DIR/download/plan.json       what all slices agree on
DIR/download/00000-of-00004/ log.txt, the shards in work, and done.json when the slice is done
DIR/00012.tar .parquet _stats.json    finished shards; the numbers of two slices never meet
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.fetch.reasons import SUCCESS, reason_of
from data_tools.lists.reading import List
from data_tools.ownership import owned
from pretrain.files import beside, move, write_json

WORK = "download"
_PART_ROWS = 200_000  # of one parquet file of the list; img2dataset holds one in memory


@dataclass(frozen=True)
class Slice:
    """The I-th of N contiguous slices of a list of `rows` rows."""

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
        """The numbers that this slice's shards may have; whole shards, so that no two slices share one."""
        shards = -(-rows // self.samples_per_shard)
        return range(self.number * shards // self.slices, (self.number + 1) * shards // self.slices)


@dataclass(frozen=True)
class Listed:
    """The slice's part of the list, as it was written."""

    rows: int
    kept: int
    dropped: dict[str, int]
    first: int  # shard
    digits: int  # of a shard's number

    def shards(self, samples_per_shard: int) -> range:
        return range(self.first, self.first + -(-self.kept // samples_per_shard))

    def path(self, out: Path, shard: int, ending: str) -> Path:
        return out / f"{shard:0{self.digits}d}{ending}"

    def rows_of(self, shard: int, samples_per_shard: int) -> int:
        return min(samples_per_shard, self.kept - (shard - self.first) * samples_per_shard)


def write_list(rows: List, part: Slice) -> Listed:
    """Writes the canonical rows of the slice, unless they are there. They appear when they are whole."""
    record = part.list / "list.json"
    if record.exists():
        return Listed(**json.loads(record.read_bytes()))
    # Only slices need to know how many rows there are, which costs a pass over a text file.
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
        pq.write_table(table, growing / f"{number:05d}.parquet")
        kept += table.num_rows
    shards = -(-(rows.rows if part.slices > 1 else kept) // part.samples_per_shard)
    dropped = dict(sorted(rows.dropped.items()))
    listed = Listed(kept + sum(dropped.values()), kept, dropped, first, max(5, len(str(max(0, shards - 1)))))
    write_json(growing / "list.json", vars(listed))
    shutil.rmtree(part.list, ignore_errors=True)
    move(growing, part.list)
    return listed


def _parts(batches: Iterator[pa.RecordBatch], samples_per_shard: int) -> Iterator[pa.Table]:
    """Tables of a whole number of shards each, but the last."""
    size = samples_per_shard * max(1, _PART_ROWS // samples_per_shard)
    held: list[pa.RecordBatch] = []
    count = 0
    for batch in batches:
        while batch.num_rows:
            held.append(batch.slice(0, size - count))
            batch = batch.slice(held[-1].num_rows)
            count += held[-1].num_rows
            if count == size:
                yield pa.Table.from_batches(held)
                held, count = [], 0
    if held:
        yield pa.Table.from_batches(held)


def owned_slice(part: Slice, plan: dict[str, Any]) -> AbstractContextManager:
    """The slice, for this process alone; `plan` is what all slices of DIR agree on. Raises ValueError if DIR holds
    something else, or another process makes this slice."""
    return owned(
        part.out,
        plan,
        stamp=part.out / WORK / "plan.json",
        work=part.work,
        stranger=lambda: any(part.out.glob("*.tar")),
    )


def account(parquet: Path) -> Counter[str]:
    """What became of each row of a shard: success, or the reason. Raises ValueError for a file that is not whole."""
    try:
        table = pq.read_table(parquet, columns=["status", "error_message"], partitioning=None)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise ValueError(f"{parquet} cannot be read ({str(error).splitlines()[0]})") from None
    counts: Counter[str] = Counter()
    for found in table.group_by(["status", "error_message"]).aggregate([([], "count_all")]).to_pylist():
        reason = SUCCESS if found["status"] == SUCCESS else reason_of(found["error_message"] or "no message")
        counts[reason] += found["count_all"]
    return counts


def publish(attempt: Path, part: Slice, listed: Listed) -> Counter[str]:
    """Moves the finished shards of an attempt to DIR, each with its _stats.json last; a shard that lost rows is left,
    to be made again. -> what became of the rows of the shards that it moved."""
    counts: Counter[str] = Counter()
    for stats in sorted(attempt.glob("*_stats.json")):
        shard = int(stats.name.removesuffix("_stats.json"))
        try:
            json.loads(stats.read_bytes())
        except ValueError:  # it is being written, or was when the worker was killed
            continue
        parquet = next(
            (
                path
                for path in (listed.path(attempt, shard, ".parquet"), listed.path(part.out, shard, ".parquet"))
                if path.exists()
            ),
            None,
        )
        if parquet is None:
            continue
        try:
            found = account(parquet)
        except ValueError:
            continue
        if found.total() != listed.rows_of(shard, part.samples_per_shard):
            continue
        for ending in (".tar", ".parquet", "_stats.json"):
            source = listed.path(attempt, shard, ending)
            if source.exists():
                move(source, listed.path(part.out, shard, ending))
        counts += found
    return counts


def published(part: Slice, listed: Listed) -> list[int]:
    """The slice's shards that stand in DIR."""
    return [
        shard
        for shard in listed.shards(part.samples_per_shard)
        if all(listed.path(part.out, shard, ending).exists() for ending in (".tar", ".parquet", "_stats.json"))
    ]
