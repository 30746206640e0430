"""Records what each step of preparing data kept and dropped, and why: a JSON per step, a parquet of dropped samples.

A step record is DIR/steps/NAME.json. Its rows always equal kept + dropped, so nothing is lost between two steps without
a reason. A drops file names samples of shards; `data_tools.rewrite` drops them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pretrain.files import open_regular, write_json, written_in_one_step
from pretrain.json_files import fields, parse_json, read_bytes, whole_numbers

STEPS = "steps"
_SCHEMA = pa.schema([(name, pa.string()) for name in ("shard", "key", "reason", "detail")])
_BATCH = 65_536
# The fields of a record, as JSON has them; seconds up to the year 9000 make a date.
_TYPES: dict[str, type] = {"unit": str, "rows": int, "kept": int, "time": float}
_TYPES |= {"dropped": dict, "settings": dict, "inputs": list}
_LAST_TIME = 220_000_000_000


@dataclass(frozen=True)
class Step:
    """The record of one tool's run. `settings` are the filters in use, with their thresholds."""

    tool: str
    rows: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> count
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    unit: str = "samples"
    time: float = field(default_factory=time.time)  # seconds since 1970; the order of the records

    def __post_init__(self) -> None:
        lost = self.rows - self.kept - sum(self.dropped.values())
        assert lost == 0, f"{self.tool}: {lost} of {self.rows} rows are neither kept nor dropped"


def write_step(directory: Path, name: str, step: Step) -> Path:
    """Writes DIRECTORY/steps/NAME.json atomically."""
    path = directory / STEPS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(step))
    return path


def read_steps(directory: Path) -> dict[str, Step]:
    """The records of a directory by name, oldest first. Raises ValueError for a damaged one."""
    steps = {}
    for path in sorted((directory / STEPS).glob("*.json")):
        try:
            steps[path.stem] = _step(parse_json(read_bytes(path)))
        except (ValueError, TypeError, AssertionError) as error:
            raise ValueError(f"{path} is not a step record ({error}); remove it, or run its tool again") from None
    return dict(sorted(steps.items(), key=lambda item: item[1].time))


def _step(content: Any) -> Step:
    """ValueError or TypeError for a record that no tool writes."""
    content = fields(content, {"tool": str})
    fields(content, {name: kind for name, kind in _TYPES.items() if name in content})
    whole_numbers(content.get("dropped", {}))
    step = Step(**content)
    if not 0 <= step.time < _LAST_TIME or not all(isinstance(name, str) for name in step.inputs):
        raise ValueError("its time is not a time, or one of its inputs is not a text")
    return step


def free_name(taken: Collection[str], name: str) -> str:
    """`name`, or NAME-2, NAME-3, ... if records carried from elsewhere have taken it."""
    names = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 2)))
    return next(free for free in names if free not in taken)


def carry_steps(inputs: Iterable[Path], out: Path) -> list[str]:
    """Copies the records of the input directories to `out`, so that its audit shows the complete history. -> their
    names there."""
    names: list[str] = []
    for directory in inputs:
        for name, step in read_steps(directory).items():
            names.append(free_name(names, name))
            write_step(out, names[-1], step)
    return names


class Drop(NamedTuple):
    shard: str  # the tar's name without .tar
    key: str
    reason: str  # a short name, such as near_duplicate
    detail: str = ""  # such as the measured value, or the sample that it repeats


def write_drops(path: Path, drops: Iterable[Drop]) -> Counter[str]:
    """Streams `drops` to a parquet file, atomically. -> the number of drops by reason."""
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
    """Every line of the files, in order. Raises ValueError for a file that is not a drops file."""
    for path in paths:
        try:
            with open_regular(path) as raw, pq.ParquetFile(raw) as file:
                names = file.schema_arrow.names
                if wrong := [name for name in _SCHEMA.names if names.count(name) != 1]:
                    raise pa.ArrowInvalid(f"it has {names.count(wrong[0])} columns called {wrong[0]}")
                for batch in file.iter_batches(_BATCH, columns=_SCHEMA.names):
                    texts = (column.cast(pa.string()).to_pylist() for column in batch.select(_SCHEMA.names))
                    yield from (Drop(*row) for row in zip(*texts, strict=True))
        except (pa.ArrowException, FileNotFoundError) as error:
            raise ValueError(
                f"{path} is not a drops file ({str(error).splitlines()[0]}); give one that dedup, leaks or "
                "filter_shards wrote"
            ) from None


def _table(rows: list[Drop]) -> pa.Table:
    return pa.Table.from_pylist([row._asdict() for row in rows], schema=_SCHEMA)
