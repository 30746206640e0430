"""Reads files of URLs and captions as raw columns in batches: parquet, csv, tsv, jsonl, and whole JSON documents.

Texts are bytes that should be UTF-8; data_tools.lists.columns decodes and checks them. A table has `columns`, `rows()`
and `batches(columns, size, first, texts)`; the column PROBLEM says why a row cannot be parsed. `texts`: the columns
that must be texts, and whether a list of texts is one too.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.inputs import tables
from data_tools.inputs.tables import BadRow
from data_tools.inputs.text_stream import open_text
from data_tools.lists.columns import PROBLEM, check_type

Row = tuple[Any, ...] | BadRow
_LINE = 2**26  # bytes of a line of JSON; longer ones are truncated
_ELEMENT = 2**26  # characters of one JSON element
_CELL = 2**17  # bytes; what is longer is too long for any use, and need not be whole for that
_BATCH = 2**26  # bytes
_CHUNK = 2**20
_WHITE = " \t\r\n"
_KINDS = {bool: "true or false", int: "a number", float: "a number", dict: "an object", list: "a list"}


@contextmanager
def arrow_errors(path: Path, what: str) -> Iterator[None]:
    """Raises whatever pyarrow raises about a file as ValueError: PATH `what` (...)."""
    try:
        yield
    except (pa.ArrowException, OSError, OverflowError) as error:
        why = str(error).strip() or type(error).__name__
        raise ValueError(f"{path} {what} ({why.splitlines()[0]}); get it again") from None


class ParquetTable:
    def __init__(self, path: Path):
        self.path = path
        with arrow_errors(path, "is not a parquet file"), pq.ParquetFile(path) as file:
            self._schema = file.schema_arrow
            self.columns = tuple(self._schema.names)
            self._groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]

    def rows(self) -> int:
        return sum(self._groups)

    def batches(
        self, columns: Sequence[str], size: int, first: int = 0, texts: Mapping[str, bool] | None = None
    ) -> Iterator[pa.RecordBatch]:
        for name, lists in (texts or {}).items():
            check_type(self.path, name, self._schema.field(name).type, lists=lists)
        groups = list(range(len(self._groups)))
        while groups and self._groups[groups[0]] <= first:
            first -= self._groups[groups.pop(0)]
        # pre_buffer would load whole column chunks into memory.
        with arrow_errors(self.path, "is damaged"), pq.ParquetFile(self.path, pre_buffer=False) as file:
            for batch in file.iter_batches(size, groups, columns=list(columns)):
                skipped = min(first, batch.num_rows)
                first -= skipped
                if skipped < batch.num_rows:
                    yield batch.slice(skipped).select(list(columns))


class TextTable:
    """The rows of a text file. `read` returns them as tuples in the order of `columns`."""

    def __init__(self, path: Path, columns: Sequence[str], read: Callable[[], Iterator[Row]]):
        self.path, self.columns, self._read = path, tuple(columns), read

    def rows(self) -> int:
        return sum(1 for _ in self._read())

    def batches(
        self, columns: Sequence[str], size: int, first: int = 0, texts: Mapping[str, bool] | None = None
    ) -> Iterator[pa.RecordBatch]:
        places = [self.columns.index(name) for name in columns]
        checks = [(name, columns.index(name), lists) for name, lists in (texts or {}).items()]
        rows = (_checked(row, places, checks) for row in islice(self._read(), first, None))
        while chunk := list(_up_to(rows, size)):
            good = [None if isinstance(row, BadRow) else row for row in chunk]
            cells = [_column([row and row[n] for row in good]) for n in range(len(places))]
            problems = [str(row) if isinstance(row, BadRow) else None for row in chunk]
            yield pa.RecordBatch.from_arrays([*cells, pa.array(problems, pa.string())], names=[*columns, PROBLEM])


def _checked(row: Row, places: list[int], checks: list[tuple[str, int, bool]]) -> Row:
    """The cells at `places` as bytes or lists of bytes, or why the row is bad."""
    if isinstance(row, BadRow):
        return row
    cells = tuple([_bytes(row[place]) for place in places])
    for name, n, lists in checks:
        value = row[places[n]]
        if value is None or isinstance(value, bytes | str):
            continue
        if isinstance(value, list) and lists and all(text is None or isinstance(text, str) for text in value):
            continue
        if not (isinstance(value, float) and math.isnan(value)):  # pandas writes NaN where there is no text
            return BadRow(f"{name!r} is {_KINDS[type(value)]}, not text")
        cells = (*cells[:n], None, *cells[n + 1 :])
    return cells


def _bytes(value: Any) -> bytes | list[bytes | None] | None:
    if isinstance(value, bytes):
        return value if len(value) <= _CELL else value[:_CELL]
    if value is None:
        return None
    if isinstance(value, list) and all(text is None or isinstance(text, str) for text in value):
        return [None if text is None else _bytes(text) for text in value]  # type: ignore[misc]
    if isinstance(value, dict | list):
        return None  # neither a text nor a number
    # A lone surrogate becomes invalid UTF-8, and counts as such.
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")[:_CELL]


def _column(cells: list[Any]) -> pa.Array:
    if any(isinstance(cell, list) for cell in cells):
        cells = [cell if cell is None or isinstance(cell, list) else [cell] for cell in cells]
        return pa.array(cells, pa.large_list(pa.large_binary()))
    return pa.array(cells, pa.large_binary())


def _up_to(rows: Iterator[Row], most: int) -> Iterator[Row]:
    """At most `most` of the next rows, fewer where they are large."""
    size = 0
    for row in islice(rows, most):
        yield row
        size += sum(map(len, filter(None, row)))
        if size > _BATCH:
            return


def delimited(path: Path, delimiter: bytes, names: Sequence[str] | None = None) -> TextTable:
    """A .csv or .tsv, in any dialect. `delimiter`: what its ending promises. `names`: its columns if it has no
    header."""
    table = tables.Table(path, delimiter, names)
    return TextTable(path, table.columns, table.rows)


def json_lines(path: Path) -> TextTable:
    """A .jsonl: one object per line. The columns are those of the first 100 objects."""

    def objects() -> Iterator[dict[str, Any] | BadRow]:
        with open_text(path) as file:
            for number, line in enumerate(_lines(file), 1):
                if line.strip():
                    yield _object(line, number)

    return _of_objects(path, objects)


def _lines(file: Any) -> Iterator[bytes]:
    """The lines, truncated to _LINE bytes."""
    while line := file.readline(_LINE):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(_LINE)):
            pass
        yield line


def _object(line: bytes, number: int) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return BadRow(f"line {number}: it is not JSON")
    return value if isinstance(value, dict) else BadRow(f"line {number}: it is no object")


def json_array(path: Path) -> TextTable:
    """A .json that is one array of objects."""

    def objects() -> Iterator[dict[str, Any] | BadRow]:
        for number, (_, value) in enumerate(json_elements(path), 1):
            yield value if isinstance(value, dict) else BadRow(f"element {number}: it is no object")

    return _of_objects(path, objects)


def _of_objects(path: Path, objects: Callable[[], Iterable[dict[str, Any] | BadRow]]) -> TextTable:
    first = (value for value in islice(objects(), 100) if not isinstance(value, BadRow))
    columns = list(dict.fromkeys(name for value in first for name in value))

    def read() -> Iterator[Row]:
        for value in objects():
            yield value if isinstance(value, BadRow) else tuple(value.get(name) for name in columns)

    return TextTable(path, columns, read)


def json_elements(path: Path, keys: Iterable[str] | None = None) -> Iterator[tuple[str, Any]]:
    """The elements of a file that is one array: ("", element); or of the arrays in a file that is one object: (key,
    element), only for `keys` if given. Has one element in memory at a time. Raises ValueError if it is not JSON."""
    wanted = None if keys is None else set(keys)
    with io.TextIOWrapper(open_text(path), encoding="utf-8", errors="surrogateescape") as file:
        scanner = _Scanner(path, file)
        opening = scanner.next_character()
        if opening == "[":
            yield from (("", value) for value in scanner.elements())
        elif opening == "{":
            for key in scanner.members():
                if scanner.peek() != "[":
                    scanner.value()
                    continue
                scanner.next_character()
                for value in scanner.elements():
                    if wanted is None or key in wanted:
                        yield key, value
        else:
            raise ValueError(f"{path} begins with {opening!r}, so it is not a JSON list; check the file and --preset")


class _Scanner:
    """Reads JSON values one by one from a file of any size."""

    def __init__(self, path: Path, file: io.TextIOWrapper):
        self._path, self._file = path, file
        self._text, self._at, self._decode = "", 0, json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next non-blank character, without consuming it; "" at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _WHITE + "\ufeff":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(_CHUNK):
                return ""

    def next_character(self) -> str:
        character = self.peek()
        self._at += 1
        return character

    def value(self) -> Any:
        self.peek()
        more = _CHUNK
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                # A number at the end of the buffer may continue.
                if end < len(self._text) or not self._more(_CHUNK):
                    self._at = end
                    return value
            except RecursionError:
                raise ValueError(f"{self._path} is nested too deeply to be a list; check the file") from None
            except ValueError as error:
                if len(self._text) - self._at > _ELEMENT or not self._more(more):
                    raise ValueError(f"{self._path} is not a complete JSON file ({error}); get it again") from None
                more *= 2  # so that the work is linear in the size of an element

    def elements(self) -> Iterator[Any]:
        """The rest of an array, after its bracket."""
        if self.peek() == "]":
            self.next_character()
            return
        while True:
            yield self.value()
            if self._ends_with("]"):
                return

    def members(self) -> Iterator[str]:
        """The keys of an object, after its brace; the caller reads each key's value before the next key."""
        if self.peek() == "}":
            return
        while True:
            key = self.value()
            if self.next_character() != ":":
                raise ValueError(f"{self._path} is not a JSON file: no colon after {key!r:.50}; get it again")
            yield str(key)
            if self._ends_with("}"):
                return

    def _ends_with(self, closing: str) -> bool:
        character = self.next_character()
        if character not in (",", closing):
            raise ValueError(
                f"{self._path} is not a complete JSON file: {character!r} instead of a comma; get it again"
            )
        return character == closing

    def _more(self, size: int) -> bool:
        text = self._file.read(size)
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(text)
