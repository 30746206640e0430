"""What each step of preparing data kept and dropped, and why: one JSON per step, one parquet of dropped samples.

A step record stands in DIR/steps/NAME.json. Its rows always equal kept + dropped, so nothing gets lost between two
steps without a reason. A drops file names samples of shards; `data_tools.rewrite` leaves them out.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.files import write_json, written_in_one_step

STEPS = "steps"
_SCHEMA = pa.schema([(name, pa.string()) for name in ("shard", "key", "reason", "detail")])
_BATCH = 65_536


@dataclass(frozen=True)
class Step:
    """One tool's account of its input. `settings` are the filters that were used with their thresholds."""

    tool: str
    rows: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> count
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    unit: str = "samples"
    time: float = field(default_factory=time.time)  # seconds since 1970; records are shown in this order

    def __post_init__(self) -> None:
        lost = self.rows - self.kept - sum(self.dropped.values())
        assert lost == 0, f"{self.tool}: {lost} of {self.rows} rows are neither kept nor dropped"


def write_step(directory: Path, name: str, step: Step) -> Path:
    """DIRECTORY/steps/NAME.json, in one piece."""
    path = directory / STEPS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(step))
    return path


def read_steps(directory: Path) -> dict[str, Step]:
    """The records of a directory by name, oldest first. Raises ValueError for one that is damaged."""
    steps = {}
    for path in sorted((directory / STEPS).glob("*.json")):
        try:
            steps[path.stem] = Step(**json.loads(path.read_bytes()))
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"{path} is no step record ({error}); remove it, or run its tool again") from None
    return dict(sorted(steps.items(), key=lambda item: item[1].time))


class Drop(NamedTuple):
    shard: str  # the tar's name without .tar
    key: str
    reason: str  # a short name, such as near_duplicate
    detail: str = ""  # what was found, such as the key it equals


def write_drops(path: Path, drops: Iterable[Drop]) -> Counter[str]:
    """Streams `drops` to a parquet file that appears when it is whole. -> how many for each reason."""
    counts: Counter[str] = Counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_in_one_step(path) as growing, pq.ParquetWriter(growing, _SCHEMA) as writer:
        rows: list[Drop] = []
        for drop in drops:
            counts[drop.reason] += 1
            rows.append(drop)
            if len(rows) == _BATCH:
                writer.write_table(_table(rows))
                rows.clear()
        writer.write_table(_table(rows))
    return counts


def read_drops(paths: Iterable[Path]) -> Iterator[Drop]:
    """Every line of the files, in their order. Raises ValueError for a file that is no drops file."""
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                if missing := set(_SCHEMA.names) - set(file.schema_arrow.names):
                    raise pa.ArrowInvalid(f"it has no column {min(missing)}")
                for batch in file.iter_batches(_BATCH, columns=_SCHEMA.names):
                    yield from (Drop(*row) for row in zip(*(column.to_pylist() for column in batch), strict=True))
        except (pa.ArrowInvalid, pa.ArrowKeyError, FileNotFoundError) as error:
            raise ValueError(
                f"{path} is no drops file ({str(error).splitlines()[0]}); give one that dedup, leaks or filter_shards "
                "wrote"
            ) from None


def _table(rows: list[Drop]) -> pa.Table:
    return pa.Table.from_pylist([row._asdict() for row in rows], schema=_SCHEMA)
