"""The parts of a list that is being filtered: a killed run continues after the last one; at the end they are joined.

.OUT.parts/, beside OUT, has NNNNN.kept.parquet, NNNNN.dropped.parquet and, written last, NNNNN.json with the counts of
each part. A part without counts is incomplete and ignored.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.ownership import owned
from pretrain.files import move, write_json, written_in_one_step
from pretrain.json_files import read_fields

DROPPED = "dropped"  # the directory beside the kept rows
SCHEMA = pa.schema([("row", pa.int64()), ("url", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
BATCH = 65_536


class Filtered(NamedTuple):
    """One batch of the list after filtering."""

    rows: pa.RecordBatch
    drops: list[pa.RecordBatch]  # of SCHEMA
    counts: Counter[str]  # drops by reason


@contextmanager
def owned_parts(out: Path, run: dict[str, Any], *, overwrite: bool) -> Iterator[Parts]:
    """The parts of `out`, reserved for this process. `run` are the settings: parts of other settings are an error, or
    deleted if `overwrite`."""
    work, way_out = work_path(out), "choose another --out, or --overwrite"
    with owned(out, run, stamp=work / "run.json", work=work, restart=lambda: overwrite, way_out=way_out):
        yield Parts(out)


class Parts:
    """The parts of one output; see `owned_parts`."""

    def __init__(self, out: Path):
        self.out, self._work = out, work_path(out)
        self._single = out.suffix == ".parquet"

    def done(self) -> list[Counter[str]]:
        """The counts of each complete part: rows, kept, and each reason."""
        counts: list[Counter[str]] = []
        while (path := self._path(len(counts), "json")).exists():
            way_out = f"remove {self._work} to start anew"
            counts.append(Counter(read_fields(path, {"rows": int, "kept": int}, way_out)))
        return counts

    def urls(self, part: int) -> Iterator[pa.Array]:
        """The URLs of a complete part's kept rows."""
        for batch in pq.ParquetFile(self._path(part, "kept.parquet")).iter_batches(BATCH, columns=["url"]):
            yield batch["url"]

    def write(self, part: int, batches: Iterable[Filtered], schema: pa.Schema) -> Counter[str]:
        """Writes all batches of a part -> its counts."""
        counts: Counter[str] = Counter(rows=0, kept=0)
        kept_path, dropped_path = self._path(part, "kept.parquet"), self._path(part, "dropped.parquet")
        with pq.ParquetWriter(kept_path, schema) as keep, pq.ParquetWriter(dropped_path, SCHEMA) as drop:
            for rows, drops, reasons in batches:
                keep.write_batch(rows)
                if drops:
                    drop.write_table(pa.Table.from_batches(drops, SCHEMA).sort_by("row"))
                counts.update(reasons)
                counts["kept"] += len(rows)
        counts["rows"] = counts.total()
        write_json(self._path(part, "json"), counts)
        return counts

    def publish(self, parts: int) -> None:
        """Moves the rows to their final place. Safe to repeat after a kill."""
        dropped = dropped_path(self.out)
        dropped.parent.mkdir(parents=True, exist_ok=True)
        _join([self._path(part, "dropped.parquet") for part in range(parts)], dropped)
        kept_paths = [self._path(part, "kept.parquet") for part in range(parts)]
        if self._single:
            _join(kept_paths, self.out)
            return
        self.out.mkdir(exist_ok=True)
        for path in self.out.glob("?????.parquet"):
            if path.stem not in {f"{part:05d}" for part in range(parts)}:
                path.unlink()  # of a longer list that is being replaced
        for part, path in enumerate(kept_paths):
            if path.exists():  # otherwise a killed run has moved it already
                move(path, self.out / f"{part:05d}.parquet")

    def remove(self) -> None:
        shutil.rmtree(self._work)

    def _path(self, part: int, ending: str) -> Path:
        return self._work / f"{part:05d}.{ending}"


def work_path(out: Path) -> Path:
    """The directory of the parts. It is removed last: while it exists, `out` is not finished."""
    return out.with_name(f".{out.name}.parts")


def home(out: Path) -> Path:
    """The directory of the step record: `out` itself, or the directory of `out` if that is a single file."""
    return out.parent if out.suffix == ".parquet" else out


def dropped_path(out: Path) -> Path:
    return home(out) / DROPPED / (out.name if out.suffix == ".parquet" else "dropped.parquet")


def _join(paths: list[Path], out: Path) -> None:
    """Concatenates parquet files into one, atomically."""
    with written_in_one_step(out) as growing:
        if len(paths) == 1:
            shutil.copyfile(paths[0], growing)
            return
        with pq.ParquetFile(paths[0]) as first, pq.ParquetWriter(growing, first.schema_arrow) as writer:
            for path in paths:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(BATCH):
                        writer.write_batch(batch)
