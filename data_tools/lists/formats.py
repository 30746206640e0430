"""Reads files of URLs and captions as raw columns in batches: parquet, csv, tsv, jsonl, and whole JSON documents.

Texts are the raw bytes of the file; data_tools.lists.reading decodes and checks them. A table has `columns`, `rows()`
and `batches(columns, size, first)`; the column PROBLEM has the reason of a row that cannot be parsed.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

PROBLEM = "_problem"
BAD_ROW = "bad_row"
Row = tuple[Any, ...] | None  # None: it cannot be parsed
_LINE = 2**20  # longer lines are truncated; such captions are too long anyway
_ELEMENT = 2**26  # characters of one JSON element or one csv cell
_CHUNK = 2**20
_WHITE = " \t\r\n"


class ParquetTable:
    def __init__(self, path: Path):
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                self.columns = tuple(file.schema_arrow.names)
                self._groups = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is not a parquet file ({str(error).splitlines()[0]}); get it again") from None

    def rows(self) -> int:
        return sum(self._groups)

    def batches(self, columns: Sequence[str], size: int, first: int = 0) -> Iterator[pa.RecordBatch]:
        groups = list(range(len(self._groups)))
        while groups and self._groups[groups[0]] <= first:
            first -= self._groups[groups.pop(0)]
        try:
            # pre_buffer would load whole column chunks into memory.
            with pq.ParquetFile(self.path, pre_buffer=False) as file:
                for batch in file.iter_batches(size, groups, columns=list(columns)):
                    skipped = min(first, batch.num_rows)
                    first -= skipped
                    if skipped < batch.num_rows:
                        yield batch.slice(skipped).select(list(columns))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path} is damaged ({str(error).splitlines()[0]}); get it again") from None


class TextTable:
    """The rows of a text file. `read` returns them as tuples in the order of `columns`."""

    def __init__(self, path: Path, columns: Sequence[str], read: Callable[[], Iterator[Row]]):
        self.path, self.columns, self._read = path, tuple(columns), read

    def rows(self) -> int:
        return sum(1 for _ in self._read())

    def batches(self, columns: Sequence[str], size: int, first: int = 0) -> Iterator[pa.RecordBatch]:
        places = [self.columns.index(name) for name in columns]
        rows = islice(self._read(), first, None)
        while chunk := list(islice(rows, size)):
            cells = [[None if row is None else _bytes(row[place]) for row in chunk] for place in places]
            problems = [BAD_ROW if row is None else None for row in chunk]
            yield pa.RecordBatch.from_arrays(
                [*(pa.array(column, pa.large_binary()) for column in cells), pa.array(problems, pa.string())],
                names=[*columns, PROBLEM],
            )


def _bytes(value: Any) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    # A lone surrogate becomes invalid UTF-8, and counts as such.
    return (value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass")


def open_text(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def lines(file: BinaryIO, limit: int = _LINE) -> Iterator[bytes]:
    """The lines without their ends, truncated to `limit` bytes."""
    while line := file.readline(limit):
        rest = line
        while not rest.endswith(b"\n") and (rest := file.readline(limit)):
            pass
        yield line.rstrip(b"\r\n")


def tab_separated(path: Path, names: Sequence[str] | None) -> TextTable:
    """A .tsv: no quotes, each line is a row. `names` are its columns if it has no header."""
    with open_text(path) as file:
        header = next(lines(file), b"") if names is None else None
    columns = _header(path, header.split(b"\t")) if header is not None else list(names or ())

    def read() -> Iterator[Row]:
        with open_text(path) as file:
            for number, line in enumerate(lines(file)):
                if number == 0 and header is not None:
                    continue
                cells = tuple(line.split(b"\t"))
                # A file without header may have more columns than `names`.
                good = len(cells) == len(columns) or (len(cells) > len(columns) and header is None)
                yield cells if good else None

    return TextTable(path, columns, read)


def comma_separated(path: Path) -> TextTable:
    """A .csv with header; quoted cells may contain line ends."""
    csv.field_size_limit(_ELEMENT)

    def raw() -> Iterator[list[str] | None]:
        # latin-1 maps every byte to one character.
        with io.TextIOWrapper(open_text(path), encoding="latin-1", newline="") as file:
            reader = csv.reader(file)
            while True:
                try:
                    if cells := next(reader):
                        yield cells
                except StopIteration:
                    return
                except csv.Error:  # the next row starts on the next line
                    yield None

    columns = _header(path, [cell.encode("latin-1") for cell in next(raw(), None) or []])

    def read() -> Iterator[Row]:
        for cells in islice(raw(), 1, None):
            good = cells is not None and len(cells) == len(columns)
            yield tuple(cell.encode("latin-1") for cell in cells) if good and cells else None

    return TextTable(path, columns, read)


def _header(path: Path, cells: list[bytes]) -> list[str]:
    names = [cell.decode("utf-8", "replace").strip().removeprefix("\ufeff") for cell in cells]
    if not any(names):
        raise ValueError(f"{path} is empty; its first line should be the names of its columns")
    return names


def json_lines(path: Path) -> TextTable:
    """A .jsonl: one object per line. The columns are those of the first 100 objects."""

    def objects() -> Iterator[dict[str, Any] | None]:
        with open_text(path) as file:
            for line in lines(file, _ELEMENT):
                if line.strip():
                    yield _object(line)

    return _of_objects(path, objects)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8", "surrogateescape"))
        return value if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        return None


def json_array(path: Path) -> TextTable:
    """A .json that is one array of objects."""

    def objects() -> Iterator[dict[str, Any] | None]:
        for _, value in json_elements(path):
            yield value if isinstance(value, dict) else None

    return _of_objects(path, objects)


def _of_objects(path: Path, objects: Callable[[], Iterable[dict[str, Any] | None]]) -> TextTable:
    columns = list(dict.fromkeys(name for value in islice(objects(), 100) for name in value or ()))

    def read() -> Iterator[Row]:
        for value in objects():
            yield None if value is None else tuple(value.get(name) for name in columns)

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
            except (ValueError, RecursionError) as error:
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
