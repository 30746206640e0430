"""The parts of a list that is being filtered: what a killed run goes on from, put together when all are there.

Beside OUT grows .OUT.parts/ with NNNNN.kept.parquet, NNNNN.dropped.parquet and, last of each part, NNNNN.json with its
counts. A part without counts does not exist.
"""

from __future__ import annotations

import json
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

DROPPED = "dropped"  # the directory beside the kept rows
SCHEMA = pa.schema([("row", pa.int64()), ("url", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
BATCH = 65_536


class Judged(NamedTuple):
    kept: pa.RecordBatch
    dropped: list[pa.RecordBatch]  # of SCHEMA
    counts: Counter[str]  # of what was dropped


@contextmanager
def owned_parts(out: Path, run: dict[str, Any], *, overwrite: bool) -> Iterator[Parts]:
    """The parts of `out`, for this process alone. `run` says what is being done: parts of another run are an error, or
    thrown away."""
    work, way_out = work_path(out), "choose another --out, or --overwrite"
    with owned(out, run, stamp=work / "run.json", work=work, restart=lambda: overwrite, way_out=way_out):
        yield Parts(out)


class Parts:
    """The parts of one output; see `owned_parts`."""

    def __init__(self, out: Path):
        self.out, self._work = out, work_path(out)
        self._single = out.suffix == ".parquet"

    def done(self) -> list[Counter[str]]:
        """The counts of each part that is whole: rows, kept, and each reason."""
        found: list[Counter[str]] = []
        while (path := self._path(len(found), "json")).exists():
            found.append(Counter(json.loads(path.read_bytes())))
        return found

    def urls(self, part: int) -> Iterator[pa.Array]:
        """The URLs that a whole part keeps."""
        for batch in pq.ParquetFile(self._path(part, "kept.parquet")).iter_batches(BATCH, columns=["url"]):
            yield batch["url"]

    def write(self, part: int, judged: Iterable[Judged], schema: pa.Schema) -> Counter[str]:
        """Takes all batches of a part -> its counts."""
        counts: Counter[str] = Counter(rows=0, kept=0)
        kept_path, dropped_path = self._path(part, "kept.parquet"), self._path(part, "dropped.parquet")
        with pq.ParquetWriter(kept_path, schema) as keep, pq.ParquetWriter(dropped_path, SCHEMA) as drop:
            for kept, dropped, reasons in judged:
                keep.write_batch(kept)
                if dropped:
                    drop.write_table(pa.Table.from_batches(dropped, SCHEMA).sort_by("row"))
                counts.update(reasons)
                counts["kept"] += len(kept)
        counts["rows"] = counts.total()
        write_json(self._path(part, "json"), counts)
        return counts

    def publish(self, parts: int) -> None:
        """Moves the rows to where they belong. Done again after a kill, it ends the same."""
        dropped = dropped_path(self.out)
        dropped.parent.mkdir(parents=True, exist_ok=True)
        _join([self._path(part, "dropped.parquet") for part in range(parts)], dropped)
        kept = [self._path(part, "kept.parquet") for part in range(parts)]
        if self._single:
            _join(kept, self.out)
            return
        self.out.mkdir(exist_ok=True)
        for path in self.out.glob("?????.parquet"):
            if path.stem not in {f"{part:05d}" for part in range(parts)}:
                path.unlink()  # of a longer list that is written over
        for part, path in enumerate(kept):
            if path.exists():  # else the run before came as far as this
                move(path, self.out / f"{part:05d}.parquet")

    def remove(self) -> None:
        shutil.rmtree(self._work)

    def _path(self, part: int, ending: str) -> Path:
        return self._work / f"{part:05d}.{ending}"


def work_path(out: Path) -> Path:
    """Where the parts grow. It goes last: where it is, `out` is not finished."""
    return out.with_name(f".{out.name}.parts")


def home(out: Path) -> Path:
    """The directory with the step record: of a single file its own, of a directory of files itself."""
    return out.parent if out.suffix == ".parquet" else out


def dropped_path(out: Path) -> Path:
    return home(out) / DROPPED / (out.name if out.suffix == ".parquet" else "dropped.parquet")


def _join(paths: list[Path], out: Path) -> None:
    """One file of the rows of all, which appears when it is whole."""
    with written_in_one_step(out) as growing:
        if len(paths) == 1:
            shutil.copyfile(paths[0], growing)
            return
        with pq.ParquetFile(paths[0]) as first, pq.ParquetWriter(growing, first.schema_arrow) as writer:
            for path in paths:
                with pq.ParquetFile(path) as file:
                    for batch in file.iter_batches(BATCH):
                        writer.write_batch(batch)
