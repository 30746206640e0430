"""Reads documents from plain text, JSONL and parquet files, in order and in bounded memory.

An unusable document is not an error but gets a reason: `too_long` (over 8 MiB), `not_utf8`, `not_json`, `no_text`
(null, missing or not a string), `empty`. An unreadable file and a missing column are errors. UTF-16 is read as UTF-8.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from data_tools.inputs.text_stream import COMPRESSED, as_utf8, check_regular, unpacked

MAX_BYTES = 2**23  # of a document: four times the longest novels; larger texts are collections of documents
TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
KINDS = {".txt": TEXT, ".jsonl": JSONL, ".ndjson": JSONL, ".json": JSONL, ".parquet": PARQUET}
SUPPORTED = ".txt, .jsonl (also with .gz, .bz2, .xz, .zst) and .parquet"
_ROWS = 256  # of parquet at a time
_FIRST_LINES = 1000  # of JSONL, in which the column is searched before the work begins
_MAX_NAMES = 20  # columns in a message


class Input(NamedTuple):
    path: Path
    name: str  # in shards and step records
    kind: str  # TEXT, JSONL or PARQUET
    column: str
    split: str  # of plain text: "file" or "blank"


class Raw(NamedTuple):
    """A document before decoding, or the reason why it is unusable."""

    source: int  # number of the input
    number: int  # within the input, from 0
    content: bytes | str
    reason: str = ""


@dataclass(frozen=True)
class Block:
    """Documents that are processed together. The division into blocks depends only on the inputs."""

    number: int
    documents: list[Raw]
    position: int  # bytes of the inputs up to its end


def find_inputs(paths: list[Path], column: str = "text", split: str = "file") -> list[Input]:
    """Files, and the files of directories by name, in this order. Raises ValueError for unsupported files, and
    for a file without the column, naming those it has; OSError."""
    files: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p) and not _hidden(p, path))
            if not inside:
                raise ValueError(f"{path} contains no documents; give files or directories of {SUPPORTED}")
            files += [(p, p.relative_to(path).as_posix()) for p in inside]
        elif not path.exists():
            raise ValueError(f"{path} does not exist; give documents in {SUPPORTED}")
        elif not kind_of(path):
            raise ValueError(f"{path} has an unsupported format; give {SUPPORTED}")
        else:
            check_regular(path, str(path))
            files.append((path, path.name))
    distinct: set[Path] = set()
    for path, _ in files:
        if (resolved := path.resolve()) in distinct:
            raise ValueError(f"{path} is given twice; give each file once")
        distinct.add(resolved)
    short = [name for _, name in files]
    names = short if len(set(short)) == len(short) else [path.as_posix() for path, _ in files]
    inputs = [Input(p, name, kind_of(p), column, split) for (p, _), name in zip(files, names, strict=True)]
    for source in inputs:
        _check_column(source)
    return inputs


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def kind_of(path: Path) -> str:
    """TEXT, JSONL or PARQUET, by the file's ending; "" for others."""
    name = path.name.lower()
    for ending in COMPRESSED:
        if name.endswith(ending):
            kind = KINDS.get(Path(name.removesuffix(ending)).suffix, "")
            return "" if kind == PARQUET else kind
    return KINDS.get(Path(name).suffix, "")


def read_blocks(inputs: list[Input], most_bytes: int = 2**22, most_documents: int = 2000) -> Iterator[Block]:
    """All documents in order. Raises ValueError or OSError, naming the file, if one is damaged or unreadable."""
    documents: list[Raw] = []
    number = size = before = 0
    for index, source in enumerate(inputs):
        for count, (content, reason, position) in enumerate(_read(source)):
            documents.append(Raw(index, count, content, reason))
            size += len(content)
            if size >= most_bytes or len(documents) >= most_documents:
                yield Block(number, documents, before + position)
                documents, size, number = [], 0, number + 1
        before += source.path.stat().st_size
    if documents:
        yield Block(number, documents, before)


def text_of_document(raw: Raw, source: Input) -> tuple[str, str]:
    """(text, "") or ("", reason)."""
    if raw.reason:
        return "", raw.reason
    try:
        text = raw.content if isinstance(raw.content, str) else raw.content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "", "not_utf8"
    if source.kind == JSONL:
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            return "", "not_json"
        value = row.get(source.column) if isinstance(row, dict) else None
        if not isinstance(value, str):
            return "", "no_text"
        text = value
    return (text, "") if text.strip() else ("", "empty")


def _read(source: Input) -> Iterator[tuple[bytes | str, str, int]]:
    """(content, reason, bytes of the file that were read)"""
    if source.kind == PARQUET:
        yield from _parquet(source)
        return
    with open(source.path, "rb") as raw, as_utf8(unpacked(raw, source.path), source.path) as file:
        read = _lines if source.kind == JSONL else _paragraphs if source.split == "blank" else _whole
        for content, reason in read(file):
            yield content, reason, raw.tell()


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, str]]:
    """Every non-blank line. A line that is too long is skipped to its end."""
    while line := file.readline(MAX_BYTES + 1):
        if len(line) <= MAX_BYTES:
            if line.strip():
                yield line, ""
            continue
        while not line.endswith(b"\n") and (line := file.readline(MAX_BYTES)):
            pass
        yield b"", "too_long"


def _paragraphs(file: IO[bytes]) -> Iterator[tuple[bytes, str]]:
    """The paragraphs between blank lines."""
    lines: list[bytes] = []
    size = 0
    while line := file.readline(MAX_BYTES + 1):
        if line.isspace() and (not lines or lines[-1].endswith(b"\n")):
            if lines:
                yield _join(lines, size)
            lines, size = [], 0
            continue
        size += len(line)
        if size > MAX_BYTES:  # it is too long: only the last part is stored, to know where its line ends
            lines.clear()
        lines.append(line)
    if lines:
        yield _join(lines, size)


def _join(lines: list[bytes], size: int) -> tuple[bytes, str]:
    return (b"".join(lines), "") if size <= MAX_BYTES else (b"", "too_long")


def _whole(file: IO[bytes]) -> Iterator[tuple[bytes, str]]:
    content = file.read(MAX_BYTES + 1)
    yield (content, "") if len(content) <= MAX_BYTES else (b"", "too_long")


def _parquet(source: Input) -> Iterator[tuple[bytes | str, str, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    size, done = source.path.stat().st_size, 0
    try:
        with pq.ParquetFile(source.path) as file:
            rows = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(_ROWS, columns=[source.column]):
                # Bytes, not text: a string column may contain invalid UTF-8, and one bad row must not end the file.
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    done += 1
                    at = size * done // rows
                    if value is None:
                        yield b"", "no_text", at
                    elif len(value) > MAX_BYTES:
                        yield b"", "too_long", at
                    else:
                        yield value, "", at
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{source.path} is truncated or damaged ({why}); fetch it again or omit it") from None


def _check_column(source: Input) -> None:
    """Checks the column before the hours of work. Raises ValueError."""
    if source.kind == PARQUET:
        _check_parquet(source)
    elif source.kind == JSONL:
        for content, _, _ in islice(_read(source), _FIRST_LINES):
            assert isinstance(content, bytes)
            text = content.decode("utf-8-sig", "replace").lstrip()
            if text.startswith("["):
                raise ValueError(f"{source.path} is a JSON list instead of lines of objects; write one object per line")
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                continue  # the first line with an object decides
            if isinstance(row, dict) and source.column not in row:
                raise _no_column(source, list(row))
            if isinstance(row, dict):
                return


def _check_parquet(source: Input) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(source.path)
    except (pa.ArrowException, OSError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{source.path} is not a parquet file ({why}); fetch it again or omit it") from None
    if source.column not in schema.names:
        raise _no_column(source, schema.names)
    if (times := schema.names.count(source.column)) > 1:
        raise ValueError(f"{source.path} has {times} columns called {source.column!r}; give each a name of its own")
    kind = schema.field(source.column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        raise ValueError(
            f"--text-col={source.column} of {source.path} has the type {kind}, not text; its columns are "
            f"{_list_names(schema.names)}"
        )


def _no_column(source: Input, names: list[str]) -> ValueError:
    return ValueError(f"--text-col={source.column} is not in {source.path}; its columns are {_list_names(names)}")


def _list_names(names: list[str]) -> str:
    more = f", and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(name[:60] for name in names[:_MAX_NAMES]) + more or "none"


def total_bytes(inputs: list[Input]) -> int:
    return sum(os.path.getsize(source.path) for source in inputs)
