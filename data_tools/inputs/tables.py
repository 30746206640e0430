"""Tables of delimited text (.csv, .tsv, captions with |): their dialect is found by looking, and every row counts.

A row ends at a line end, or where quotes are in use after the line in which its last quote closes. A quote that never
closes costs only the row in which it opens: the lines after it are read again as rows of their own.
"""

from __future__ import annotations

import ast
import io
import json
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

from data_tools.inputs.text_stream import open_text

DELIMITERS = (b"\t", b",", b";", b"|")
LINE = 2**24  # bytes; longer lines are truncated, and no row has more
_LINES = 1000  # of a row; so that a hostile table of open quotes does not take for ever
_HEAD = 2**22  # bytes that decide about the dialect
_FEW = 2**17  # bytes that decide about the delimiter
_HEADER = 2**16  # bytes of a name
_COLUMNS = 10_000
_REGULAR = 0.5  # of the rows have as many cells as they should: it is the delimiter
_OPENING = re.compile(rb' *"')
_QUOTES = re.compile(rb'"+')
_ESCAPED_OR_QUOTE = re.compile(rb'\\.|"', re.DOTALL)
_END = re.compile(rb" *(?=[\r\n]|$)")
# A line inside a quoted cell that begins like a row, with a URL or the name of a picture, is a row.
_PICTURE = re.compile(rb"""\s*"?(?:https?://|[^\s"]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)\b)""", re.IGNORECASE)
_OPEN = "its quote is never closed"
# Possessive (*+), so that no text makes them try again and again.
_TEXT = r"""(?:'(?:[^'\\]|\\.)*+'|"(?:[^"\\]|\\.)*+")"""
_LIST = re.compile(rf"\[\s*+(?:{_TEXT}(?:\s*+,\s*+{_TEXT})*+\s*+,?+\s*+)?+\]", re.DOTALL)


class BadRow(str):
    """Why a row cannot be read, with its line."""


Cells = tuple[bytes, ...]


class Dialect(NamedTuple):
    delimiter: bytes
    quotes: str = ""  # how a quote inside a quoted cell is written: "" or \"; empty: cells are never quoted


class Table:
    """An open table. `names`: its columns if it has no header; `default`: its delimiter if nothing speaks for another.
    Raises ValueError for a file without a header or with a damaged one."""

    def __init__(self, path: Path, default: bytes, names: Sequence[str] | None = None):
        self.path, self._headless = path, names is not None
        with open_text(path) as file:
            head = file.read(_HEAD)
            if file.read(1):
                head = head[: head.rfind(b"\n") + 1] or head
        self.dialect, self._width = _look(head, default, len(names or ()))
        if names is None:
            cells = next(_Rows(io.BytesIO(head), self.dialect, 0).rows(), ())
            if isinstance(cells, BadRow):
                raise ValueError(f"{path} has a header that cannot be read ({cells}); write the names of its columns")
            if len(cells) > _COLUMNS:
                raise ValueError(f"{path} has {len(cells)} columns; the limit is {_COLUMNS}, so check its first line")
            names = [cell[:_HEADER].decode("utf-8", "replace").strip() for cell in cells]
            if not any(names):
                raise ValueError(f"{path} is empty; its first line should be the names of its columns")
        self.columns = tuple(names)

    def rows(self) -> Iterator[Cells | BadRow]:
        """The rows after the header. Without a header they may have more cells than there are `columns`."""
        with open_text(self.path) as file:
            yield from islice(_Rows(file, self.dialect, self._width).rows(), 0 if self._headless else 1, None)


class _Rows:
    """The rows of an open file, the header included. `width`: the cells that a row must have; 0: any number, but then
    each row must be one line."""

    def __init__(self, file: BinaryIO, dialect: Dialect, width: int):
        self._file, self._delimiter, self._quotes, self._width = file, dialect.delimiter, dialect.quotes, width
        self._most_lines = _LINES if width else 1
        self._again: deque[bytes] = deque()  # lines that are to be read again
        self._number = 0  # of the last line
        self.seen: Counter[str] = Counter()  # quoted cells: plain, needed, and malformed

    def rows(self) -> Iterator[Cells | BadRow]:
        while line := self._next():
            if not line.strip(b"\r\n"):
                continue
            number = self._number
            if self._quotes and b'"' in line:
                cells, taken = self._quoted_row(line)
            else:
                cells, taken = self._split(line), []
            if not isinstance(cells, BadRow) and self._width and len(cells) != self._width:
                many = len(cells) if len(cells) <= self._width else f"more than {self._width}"
                cells = BadRow(f"{many} cells instead of {self._width}")
            if isinstance(cells, BadRow):
                self._again.extendleft(reversed(taken))
                self._number -= len(taken)
                yield BadRow(f"line {number}: {cells}")
            else:
                yield tuple(cells)

    def _next(self) -> bytes:
        """The next line with its end; b"" at the end of the file."""
        if self._again:
            line = self._again.popleft()
        else:
            line = rest = self._file.readline(LINE)
            while rest and not rest.endswith(b"\n") and (rest := self._file.readline(LINE)):
                pass
        self._number += bool(line)
        return line

    def _split(self, line: bytes) -> list[bytes]:
        # One cell more than the row must have shows that it has too many.
        return line.rstrip(b"\r\n").split(self._delimiter, self._width or -1)

    def _quoted_row(self, line: bytes) -> tuple[list[bytes] | BadRow, list[bytes]]:
        """(the cells of the row that begins with `line`, the lines after it that belong to it)."""
        cells: list[bytes] = []
        taken: list[bytes] = []
        at = 0
        while True:
            if opening := _OPENING.match(line, at):
                cell, line, at = self._quoted_cell(line, opening.end(), taken)
                if isinstance(cell, BadRow):
                    return cell, taken
                end = at
            else:
                end = line.find(self._delimiter, at)
                cell = line[at:end] if end >= 0 else line[at:].rstrip(b"\r\n")
            cells.append(cell)
            if end < 0 or not line.startswith(self._delimiter, end):
                break
            if self._width and len(cells) > self._width:
                break
            at = end + len(self._delimiter)
        if taken and self._contains_rows(cells, taken):
            self.seen["malformed"] += 1
            return BadRow("its quote closes only after other rows"), taken
        return cells, taken

    def _quoted_cell(self, line: bytes, at: int, taken: list[bytes]) -> tuple[bytes | BadRow, bytes, int]:
        """(the cell, the line in which it ends, the place of what follows it)."""
        parts, size, first = [], 0, at
        while (close := self._closing(line, at)) < 0:
            parts.append(line[at:])
            size += len(line)
            if size > LINE or len(taken) + 1 >= self._most_lines or not (line := self._next()):
                self.seen["malformed"] += 1
                return BadRow(_OPEN), line, 0
            taken.append(line)
            at = 0
        parts.append(line[at:close])
        cell = b"".join(parts)
        after = close + 1
        if blanks := _END.match(line, after):
            at = blanks.end()
        elif (at := line.find(self._delimiter, after)) < 0 or line[after:at].strip(b" "):
            self.seen["malformed"] += 1
            if taken:
                return BadRow(_OPEN), line, 0
            at = at if at >= 0 else len(line.rstrip(b"\r\n"))
            # Quotes that the writer did not escape belong to the text.
            cell = line[first:at]
            return cell[:-1] if cell.endswith(b'"') else b'"' + cell, line, at
        needed = b'"' in cell or b"\n" in cell or self._delimiter in cell
        self.seen["needed" if needed else "plain"] += 1
        if self._quotes == '""':
            return cell.replace(b'""', b'"'), line, at
        return cell.replace(b'\\"', b'"').replace(b"\\\\", b"\\"), line, at

    def _closing(self, line: bytes, at: int) -> int:
        if self._quotes == '""':  # an odd number of quotes in a row: pairs, and the closing one
            runs = (run for run in _QUOTES.finditer(line, at) if (run.end() - run.start()) % 2)
            return next((run.end() - 1 for run in runs), -1)
        found = (match.start() for match in _ESCAPED_OR_QUOTE.finditer(line, at) if match[0] == b'"')
        return next(found, -1)

    def _contains_rows(self, cells: list[bytes], lines: list[bytes]) -> bool:
        """Whether one of the lines is a row by itself, because a quote that was never closed swallowed it."""
        places = [place for place, cell in enumerate(cells) if _PICTURE.match(cell)]
        for line in lines if places else ():
            parts = line.rstrip(b"\r\n").split(self._delimiter, len(cells))
            if len(parts) == len(cells) and any(_PICTURE.match(parts[place]) for place in places):
                return True
        return False


def _look(head: bytes, default: bytes, least: int) -> tuple[Dialect, int]:
    """(dialect, cells of a row) of the table that begins with `head`. `least`: the columns of one without a header."""
    few = head[: head.rfind(b"\n", 0, _FEW) + 1] or head
    place = few if least else few.partition(b"\n")[0]
    regular = {mark: _regularity(few, mark, least) for mark in DELIMITERS if mark in place}
    mark = default
    if regular.get(default, 0.0) < _REGULAR:
        mark = max(regular, key=lambda mark: regular[mark], default=default)
    width = _width(few, Dialect(mark, '""'), least)
    dialect = Dialect(mark, _quotes(head, mark, width))
    return dialect, _width(few, dialect, least)


def _width(head: bytes, dialect: Dialect, least: int) -> int:
    """The cells of the header, or without one those of most rows."""
    widths = (len(row) for row in _Rows(io.BytesIO(head), dialect, 0).rows() if not isinstance(row, BadRow))
    if not least:
        return next(widths, 0)
    counts = Counter(widths).most_common(1)
    return max(least, *(width for width, _ in counts)) if counts else least


def _regularity(head: bytes, delimiter: bytes, least: int) -> float:
    """The share of the rows that have as many cells as they should, with the better of quotes and none."""
    shares = []
    for quotes in ("", '""'):
        dialect = Dialect(delimiter, quotes)
        rows = list(_Rows(io.BytesIO(head), dialect, _width(head, dialect, least)).rows())
        shares.append(sum(not isinstance(row, BadRow) for row in rows) / max(len(rows), 1))
    return max(shares)


def _quotes(head: bytes, delimiter: bytes, width: int) -> str:
    """How cells are quoted. Programs quote with commas and semicolons; with tabs and | many write quotes as they are,
    so there the quoted cells must outnumber those that only begin with a quote."""
    seen = {}
    for quotes in ('""', '\\"'):
        rows = _Rows(io.BytesIO(head), Dialect(delimiter, quotes), width)
        deque(rows.rows(), maxlen=0)
        seen[quotes] = rows.seen
    quotes = min(seen, key=lambda each: seen[each]["malformed"])
    counts = seen[quotes]
    if delimiter in b",;":
        return quotes
    # A cell that had to be quoted is no accident; quotes around a whole caption may be its own.
    return quotes if counts["plain"] + 4 * counts["needed"] > 2 * counts["malformed"] else ""


def texts_in(cell: str) -> list[str] | None:
    """The texts of a cell that is a list of texts in JSON or as Python prints it; None for any other cell."""
    text = cell.strip()
    if not (text.startswith("[") and _LIST.fullmatch(text)):
        return None
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return [ast.literal_eval(match) for match in re.findall(_TEXT, text, re.DOTALL)]
    except (ValueError, SyntaxError):
        return None
