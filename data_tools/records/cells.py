"""Pictures in the cells of parquet and arrow files, group by group: bytes, or as `datasets` has them, a structure of
bytes and path."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.lists.formats import arrow_errors
from data_tools.records.record import Cell
from pretrain.files import open_regular

ARROW = (".arrow", ".feather", ".ipc")
CELLS = 512  # rows of an arrow file that are handed out together


class Groups:
    """An open file. ValueError, naming it, wherever it is damaged."""

    def __init__(self, path: Path):
        self.path, self._parquet, self._table = path, None, None
        with arrow_errors(path, "is not a parquet or arrow file"):
            if path.suffix.lower() in ARROW:
                self._table = _arrow(path)
                self.schema, self.count = self._table.schema, -(-len(self._table) // CELLS)
            else:
                self._parquet = pq.ParquetFile(open_regular(path), pre_buffer=False)
                self.schema, self.count = self._parquet.schema_arrow, self._parquet.num_row_groups

    def read(self, group: int, columns: Sequence[str]) -> pa.Table:
        with arrow_errors(self.path, "is damaged"):
            if self._table is not None:
                return self._table.select(list(columns)).slice(group * CELLS, CELLS)
            return self._parquet.read_row_group(group, columns=list(columns))  # type: ignore[union-attr]

    def picture_paths(self, group: int, column: str) -> list[str | None]:
        """The path of each row's picture; None where the cell holds its bytes."""
        kind = self.schema.field(column).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            return [value or "" for value in self.read(group, [column])[column].to_pylist()]
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return [None] * len(self.read(group, [column]))
        names = [field.name for field in kind] if pa.types.is_struct(kind) else []
        if "bytes" not in names:
            what = str(kind)[:60]
            raise ValueError(f"{self.path}: the column {column} is {what}, not pictures; choose --picture-col")
        values = self.read(group, [column])[column].combine_chunks()
        with arrow_errors(self.path, "is damaged"):
            filled = values.field("bytes").is_valid().to_pylist()
            paths = values.field("path").to_pylist() if "path" in names else [None] * len(filled)
        return [None if full else str(path or "") for full, path in zip(filled, paths, strict=True)]

    def picture(self, group: int, row: int, column: str) -> Any:
        return _read(self.path, group, column)[column][row].as_py()


def _arrow(path: Path) -> pa.Table:
    """The table of an arrow file, mapped and not read; its offsets are checked, for they come from outside."""
    source = pa.memory_map(str(path))
    try:
        table = pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    table.validate(full=True)
    return table


@lru_cache(maxsize=4)
def open_groups(path: Path) -> Groups:
    return Groups(path)


@lru_cache(maxsize=2)
def _read(path: Path, group: int, column: str) -> pa.Table:
    return open_groups(path).read(group, [column])


def cell_bytes(cell: Cell) -> bytes:
    """The bytes of the picture in a cell. ValueError where there are none."""
    value = open_groups(cell.file).picture(cell.group, cell.row, cell.column)
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError("its cell holds no bytes")
    return data
