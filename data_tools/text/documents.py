"""Reads documents from plain text, JSONL and parquet files, in order and in bounded memory.

What cannot be used is not an error but a document with a reason: `too_long` (over 8 MiB), `not_utf8`, `not_json`,
`no_text` (null, missing or no string), `empty`. A file that cannot be read, and a column that is not there, are errors.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

MAX_BYTES = 2**23  # of a document: four times the longest novels; more is no document but a file of them
TEXT, JSONL, PARQUET = "text", "jsonl", "parquet"
KINDS = {".txt": TEXT, ".jsonl": JSONL, ".ndjson": JSONL, ".json": JSONL, ".parquet": PARQUET}
PACKED = (".gz", ".bz2", ".xz", ".zst")
SUPPORTED = ".txt, .jsonl (also with .gz, .bz2, .xz, .zst) and .parquet"
_ROWS = 256  # of parquet at a time
_FIRST_LINES = 1000  # of JSONL that are looked at for the column before the work begins
_SHOWN = 20  # names of columns in a message


class Input(NamedTuple):
    path: Path
    name: str  # as shards and records call it
    kind: str  # TEXT, JSONL or PARQUET
    column: str
    split: str  # of plain text: "file" or "blank"


class Raw(NamedTuple):
    """A document as it stands in its file: not decoded yet, or a reason why there is none."""

    source: int  # number of the input
    number: int  # within the input, from 0
    content: bytes | str
    reason: str = ""


@dataclass(frozen=True)
class Block:
    """Documents that are worked on together. Where blocks begin and end follows from the inputs alone."""

    number: int
    documents: list[Raw]
    position: int  # bytes of the inputs that were read up to its end


def find_inputs(paths: list[Path], column: str = "text", split: str = "file") -> list[Input]:
    """Files, and the files of directories by name, in this order. Raises ValueError for what is none of SUPPORTED, and
    for a file without the column, naming those it has; OSError."""
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p) and not _hidden(p, path))
            if not inside:
                raise ValueError(f"{path} holds no documents; give files or directories of {SUPPORTED}")
            found += [(p, p.relative_to(path).as_posix()) for p in inside]
        elif not path.is_file():
            raise ValueError(f"{path} is wrong because there is no such file; give documents in {SUPPORTED}")
        elif not kind_of(path):
            raise ValueError(f"{path} is of no kind that is read here; give {SUPPORTED}")
        else:
            found.append((path, path.name))
    known: set[Path] = set()
    for path, _ in found:
        if (file := path.resolve()) in known:
            raise ValueError(f"{path} is given twice; give each file once")
        known.add(file)
    short = [name for _, name in found]
    names = short if len(set(short)) == len(short) else [path.as_posix() for path, _ in found]
    inputs = [Input(p, name, kind_of(p), column, split) for (p, _), name in zip(found, names, strict=True)]
    for source in inputs:
        _check_column(source)
    return inputs


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def kind_of(path: Path) -> str:
    """TEXT, JSONL or PARQUET by the ending; "" for others."""
    name = path.name.lower()
    for ending in PACKED:
        if name.endswith(ending):
            kind = KINDS.get(Path(name.removesuffix(ending)).suffix, "")
            return "" if kind == PARQUET else kind
    return KINDS.get(Path(name).suffix, "")


def read_blocks(inputs: list[Input], most_bytes: int = 2**22, most_documents: int = 2000) -> Iterator[Block]:
    """All documents in order. Raises ValueError, OSError naming the file that is damaged or cannot be read."""
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
    try:
        if source.kind == PARQUET:
            yield from _parquet(source)
            return
        with open(source.path, "rb") as raw, _unpacked(raw, source.path) as file:
            read = _lines if source.kind == JSONL else _paragraphs if source.split == "blank" else _whole
            for content, reason in read(file):
                yield content, reason, raw.tell()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{source.path} is cut off or damaged ({error}); fetch it again or leave it out") from None
    except OSError as error:
        if error.filename is None and error.errno is None:  # a decompressor's own complaint
            raise ValueError(f"{source.path} is cut off or damaged ({error}); fetch it again or leave it out") from None
        raise


def _unpacked(raw: IO[bytes], path: Path) -> IO[bytes]:
    ending = path.suffix.lower()
    if ending == ".gz":
        return gzip.open(raw)  # type: ignore[return-value]
    if ending == ".bz2":
        return bz2.open(raw)
    if ending == ".xz":
        return lzma.open(raw)
    if ending == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"), 2**20)
    return raw


def _lines(file: IO[bytes]) -> Iterator[tuple[bytes, str]]:
    """Every line that is not blank. Of one that is too long only the end is looked for."""
    while line := file.readline(MAX_BYTES + 1):
        if len(line) <= MAX_BYTES:
            if line.strip():
                yield line, ""
            continue
        while not line.endswith(b"\n") and (line := file.readline(MAX_BYTES)):
            pass
        yield b"", "too_long"


def _paragraphs(file: IO[bytes]) -> Iterator[tuple[bytes, str]]:
    """What stands between blank lines."""
    lines: list[bytes] = []
    size = 0
    while line := file.readline(MAX_BYTES + 1):
        if line.isspace() and (not lines or lines[-1].endswith(b"\n")):
            if lines:
                yield _joined(lines, size)
            lines, size = [], 0
            continue
        size += len(line)
        # Of what is too long the last part stays, to know where its line ends.
        lines = [*lines, line] if size <= MAX_BYTES else [line]
    if lines:
        yield _joined(lines, size)


def _joined(lines: list[bytes], size: int) -> tuple[bytes, str]:
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
                # Bytes, not text: a string column may hold what is no UTF-8, and one bad row must not end the file.
                for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                    done += 1
                    at = size * done // rows
                    if value is None:
                        yield b"", "no_text", at
                    elif len(value) > MAX_BYTES:
                        yield b"", "too_long", at
                    else:
                        yield value, "", at
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{source.path} is cut off or damaged ({why}); fetch it again or leave it out") from None


def _check_column(source: Input) -> None:
    """Before hours of work. Raises ValueError."""
    if source.kind == PARQUET:
        _check_parquet(source)
    elif source.kind == JSONL:
        for content, _, _ in islice(_read(source), _FIRST_LINES):
            assert isinstance(content, bytes)
            text = content.decode("utf-8-sig", "replace").lstrip()
            if text.startswith("["):
                raise ValueError(f"{source.path} holds a JSON list and no lines of objects; write one object per line")
            try:
                row = json.loads(text)
            except (ValueError, RecursionError):
                continue  # the first line that is an object decides
            if isinstance(row, dict) and source.column not in row:
                raise _no_column(source, list(row))
            if isinstance(row, dict):
                return


def _check_parquet(source: Input) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(source.path)
    except (pa.ArrowInvalid, OSError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"{source.path} is no parquet file ({why}); fetch it again or leave it out") from None
    if source.column not in schema.names:
        raise _no_column(source, schema.names)
    kind = schema.field(source.column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind)):
        raise ValueError(
            f"--text-col={source.column} of {source.path} holds {kind} and not text; its columns are "
            f"{_shown(schema.names)}"
        )


def _no_column(source: Input, names: list[str]) -> ValueError:
    return ValueError(f"--text-col={source.column} is not in {source.path}; its columns are {_shown(names)}")


def _shown(names: list[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name[:60] for name in names[:_SHOWN]) + more or "none"


def total_bytes(inputs: list[Input]) -> int:
    return sum(os.path.getsize(source.path) for source in inputs)
