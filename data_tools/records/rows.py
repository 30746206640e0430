"""Tables as records: CSV in any dialect, JSON lines, JSON arrays, parquet, and directories of Hugging Face `datasets`
(parquet or arrow), whose cells may hold the pictures. Nothing of a data set is executed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_tools.inputs.tables import BadRow, Table
from data_tools.inputs.text_stream import open_text
from data_tools.lists.formats import json_elements
from data_tools.records.annotations import (
    LABELS,
    RELATIONS,
    entailment,
    is_entailment,
    is_two_pictures,
    two_pictures,
)
from data_tools.records.cells import ARROW, open_groups
from data_tools.records.record import Cell, Pictures, Record, Unusable, captions_of, label_of
from pretrain.json_files import parse_json, read_object

# Names of columns in lower case; the first that a table has is used.
PICTURE = ("image", "picture", "img", "jpg", "png", "file_name", "filename", "filepath", "image_path", "image_name")
CAPTION = ("captions", "caption", "sentences", "sentence", "text", "texts", "raw", "comment", "description")
LABEL = ("label", "labels", "class", "class_name", "category", "fine_label")
SPLIT = ("split",)
LINE = 2**26  # bytes of a line of JSON
TABLES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson", ".parquet", *ARROW)
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


# The records, and the names of their labels by number, where the files know them.
Reading = tuple[Iterator[Record | Unusable], tuple[str, ...] | None]


@dataclass(frozen=True)
class ColumnOptions:
    """The names of columns that the user gave; empty: the usual ones."""

    picture: str = ""
    captions: tuple[str, ...] = ()
    label: str = ""
    split: str = ""


@dataclass(frozen=True)
class Columns:
    """A table's own names of what is read from it."""

    picture: str
    captions: tuple[str, ...]
    label: str | None
    split: str | None

    @classmethod
    def of(cls, names: Sequence[str], options: ColumnOptions, where: Path) -> Columns:
        """ValueError for a table without pictures, or without a column that was asked for."""
        lower = {name.lower(): name for name in reversed(names)}

        def one(asked: str, usual: Sequence[str], option: str) -> str | None:
            if asked and asked.lower() not in lower:
                shown = ", ".join(names)[:300]
                raise ValueError(f"{option} {asked}: {where} has no such column; it has {shown}")
            return lower[asked.lower()] if asked else next((lower[name] for name in usual if name in lower), None)

        picture = one(options.picture, PICTURE, "--picture-col")
        if picture is None:
            raise ValueError(
                f"{where} has no column of pictures that is called {', '.join(PICTURE[:6])} or the like, but "
                f"{', '.join(names)[:300]}; name one with --picture-col"
            )
        asked = [one(name, (), "--caption-col") for name in options.captions]
        captions = [name for name in (asked or [one("", CAPTION, "")]) if name is not None]
        label, split = one(options.label, LABEL, "--label-col"), one(options.split, SPLIT, "--split-col")
        return cls(picture, tuple(captions), label, split)


def read_table(path: Path, pictures: Pictures, options: ColumnOptions) -> Reading:
    """A file of rows."""
    stem = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    if stem.suffix.lower() in (".parquet", *ARROW):
        return _from_cells([(path, "")], path.parent, pictures, options)
    if stem.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        rows = list(_objects(path))
        good = [row for _, row in rows if isinstance(row, dict)]
        for is_such, record_of, labels in (
            (is_two_pictures, two_pictures, LABELS),
            (is_entailment, entailment, RELATIONS),
        ):
            if good and all(is_such(row) for row in good):
                return (r if isinstance(r, Unusable) else record_of(r, pictures) for _, r in rows), labels
        names = list(dict.fromkeys(name for row in good for name in row))
        return _records(rows, Columns.of(names, options, path), pictures), None
    table = Table(path, b"\t" if stem.suffix.lower() == ".tsv" else b",")
    return _records(_delimited(table), Columns.of(table.columns, options, path), pictures), None


def read_datasets(root: Path, pictures: Pictures, options: ColumnOptions) -> Reading:
    """A directory that `datasets` wrote (save_to_disk), or of a data set's parquet files."""
    files = [(path, _split_of(path, root)) for path in dataset_files(root)]
    return _from_cells(files, root, pictures, options)


def dataset_files(root: Path) -> list[Path]:
    """The parquet or arrow files below a directory; those of `datasets`' caches of mapped columns are left out."""
    found = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in (".parquet", *ARROW) and path.is_file()]
    return [path for path in found if not path.name.startswith(("cache-", "."))]


def _split_of(path: Path, root: Path) -> str:
    """Of train/data-00000-of-00001.arrow and of data/train-00000-of-00001.parquet: train."""
    folder = path.parent.name if path.parent != root else ""
    if match := re.fullmatch(r"([A-Za-z_]+)-\d+(?:-of-\d+)?", path.stem):
        name = match[1]
        return folder if name == "data" and folder != "data" else "" if name == "data" else name
    return folder if folder != "data" else ""


def json_kind(path: Path) -> str:
    """array, object, or lines: an object in each, as NLVR2's files have it, whatever their ending."""
    with open_text(path) as file:
        first = file.readline(LINE).lstrip(b"\xef\xbb\xbf \t")
        while first and not first.strip():
            first = file.readline(LINE)
        more = file.read(1)
    if first.lstrip().startswith(b"["):
        return "array"
    try:
        return "lines" if (more or path.suffix != ".json") and isinstance(parse_json(first), dict) else "object"
    except ValueError:
        return "object"


def _objects(path: Path) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    """The objects of JSON lines or of an array, each with its place."""
    if json_kind(path) == "array":
        for number, (_, value) in enumerate(json_elements(path), 1):
            name = f"{path.name}, element {number}"
            yield name, value if isinstance(value, dict) else Unusable(name, "bad_row", "it is no object")
        return
    with open_text(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(LINE), b""), 1):
            name = f"{path.name}, line {number}"
            if not line.strip():
                continue
            try:
                value = parse_json(line)
            except ValueError as error:
                yield name, Unusable(name, "bad_row", str(error))
                continue
            yield name, value if isinstance(value, dict) else Unusable(name, "bad_row", "it is no object")


def _delimited(table: Table) -> Iterator[tuple[str, dict[str, Any] | Unusable]]:
    for number, row in enumerate(table.rows(), 1):
        name = f"{table.path.name}, row {number}"
        if isinstance(row, BadRow):
            yield name, Unusable(name, "bad_row", str(row))
        else:
            cells = (cell.decode("utf-8", "replace").strip() for cell in row)
            yield name, dict(zip(table.columns, cells, strict=False))


def _records(
    rows: Iterable[tuple[str, dict[str, Any] | Unusable]], columns: Columns, pictures: Pictures
) -> Iterator[Record | Unusable]:
    for name, row in rows:
        if isinstance(row, Unusable):
            yield row
            continue
        value = row.get(columns.picture)
        try:
            if not isinstance(value, str) or not value:
                raise ValueError(f"its {columns.picture} is no name of a file")
            yield _record(name, pictures.find(value), row, columns)
        except ValueError as error:
            yield Unusable(name, "bad_row", str(error))


def _record(name: str, picture: Path | Cell, row: Mapping[str, Any], columns: Columns, split: str = "") -> Record:
    captions = tuple(text for column in columns.captions for text in captions_of(row.get(column)))
    if columns.captions and not captions and columns.label is None:
        raise ValueError(f"its {' and '.join(columns.captions)} is empty")
    label = None if columns.label is None else label_of(row.get(columns.label))
    named = "" if columns.split is None else str(row.get(columns.split) or "").strip()
    return Record(name, (picture,), captions, label, named or split)


def _from_cells(files: list[tuple[Path, str]], root: Path, pictures: Pictures, options: ColumnOptions) -> Reading:
    schema = open_groups(files[0][0]).schema
    columns = Columns.of(schema.names, options, files[0][0])
    names = class_names(schema, columns.label, root)
    return (record for path, split in files for record in _of_file(path, split, columns, pictures)), names


def _of_file(path: Path, split: str, columns: Columns, pictures: Pictures) -> Iterator[Record | Unusable]:
    groups = open_groups(path)
    others = [name for name in (*columns.captions, columns.label, columns.split) if name is not None]
    if missing := [name for name in (columns.picture, *others) if name not in groups.schema.names]:
        raise ValueError(f"{path} has no column {missing[0]}, which the first file of the data set has; give one set")
    for group in range(groups.count):
        rows = groups.read(group, others).to_pylist()
        for number, (name, row) in enumerate(zip(groups.picture_paths(group, columns.picture), rows, strict=True)):
            where = f"{path.name}, group {group}, row {number}"
            try:
                found = Cell(path, columns.picture, group, number) if name is None else pictures.find(name)
                yield _record(where, found, row, columns, split)
            except ValueError as error:
                yield Unusable(where, "bad_row", str(error))


def class_names(schema: pa.Schema, column: str | None, root: Path) -> tuple[str, ...] | None:
    """The names of the classes of a ClassLabel column, which `datasets` notes in the schema or in dataset_info.json;
    None where it notes none."""
    notes: list[Any] = []
    if data := (schema.metadata or {}).get(b"huggingface"):
        notes.append(parse_json(data))
    for path in (root / "dataset_info.json", *sorted(root.glob("*/dataset_info.json"))):
        if path.is_file():
            notes.append(read_object(path))
    for content in notes:
        for key in ("info", "features", column, "names"):
            if key == "info" and isinstance(content, dict) and "info" not in content:
                continue
            content = content.get(key) if isinstance(content, dict) else None
        if isinstance(content, list) and content and all(isinstance(name, str) for name in content):
            return tuple(content)
    return None
