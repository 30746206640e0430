"""Reads lists of URLs and captions, in the formats in which they are published, as canonical batches.

Canonical columns: row (its number in the list, over all files), url, caption, and whichever of similarity, punsafe,
pwatermark, width, height and language the list has. An unusable row is dropped and counted under its reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.lists.formats import (
    BAD_ROW,
    PROBLEM,
    ParquetTable,
    comma_separated,
    json_array,
    json_lines,
    tab_separated,
)
from data_tools.lists.json_formats import coco_captions, sbu_captions, visual_genome

# Servers reject longer ones; longer ones are mostly data: URLs.
MAX_URL_BYTES = 8192
MAX_CAPTION_BYTES = 65_536
REASONS = (BAD_ROW, "empty_url", "long_url", "long_caption", "not_utf8", "nul_byte", "empty_caption")
NUMBERS = {"similarity": pa.float64(), "punsafe": pa.float64(), "pwatermark": pa.float64()}
NUMBERS |= {"width": pa.int64(), "height": pa.int64()}
EXTRA = {**NUMBERS, "language": pa.string()}
# The names of each in published lists, in lower case; the first that a list has is used.
_NAMES = {
    "similarity": ("similarity", "clip_similarity_vitl14", "clip_similarity_vitb32"),
    "punsafe": ("punsafe", "nsfw_score_opennsfw2"),
    "pwatermark": ("pwatermark", "watermark_score"),
    "width": ("width", "original_width"),
    "height": ("height", "original_height"),
    "language": ("language", "lang"),
}
_LOOK_AT = 100
BatchAndDrops = tuple[pa.RecordBatch, pa.RecordBatch]  # the usable rows; (row, reason) of the others


class Preset(NamedTuple):
    what: str
    url: tuple[str, ...] = ("url",)  # names in lower case; the first that a list has is used
    caption: tuple[str, ...] = ("caption",)
    header: tuple[str, ...] | None = None  # of a .tsv without one


PRESETS = {
    "laion": Preset("LAION-400M, -5B, -COCO, Re-LAION: parquet", caption=("text", "caption")),
    # Order of the columns: google-research-datasets/conceptual-12m; its predecessor has them in reverse.
    "cc12m": Preset("Conceptual 12M: .tsv, url<TAB>caption, no header", header=("url", "caption")),
    "cc3m": Preset("Conceptual Captions: .tsv, caption<TAB>url, no header", header=("caption", "url")),
    "coyo": Preset("COYO-700M: parquet", caption=("text",)),
    "coco": Preset("COCO captions: captions_*.json, or parquet with url and text", caption=("text", "caption")),
    "sbu": Preset(
        "SBU captions: sbu-captions-all.json, or a table", ("image_urls", "url", "image_url"), ("captions", "caption")
    ),
    "visual_genome": Preset("Visual Genome regions: region_descriptions.json image_data.json"),
    "canonical": Preset("what data_tools.filter_list writes: parquet with row, url, caption"),
    "generic": Preset("any parquet, csv, tsv, jsonl or json, with --url-col and --caption-col", (), ()),
}
FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")


class Table(Protocol):
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def path(self) -> Path: ...
    def rows(self) -> int: ...
    def batches(self, columns: Sequence[str], size: int, first: int = 0) -> Iterator[pa.RecordBatch]: ...


@dataclass
class List:
    """An open list. Reading it fills `dropped`."""

    preset: str
    _tables: list[tuple[Table, Mapping[str, str]]]  # (table, canonical column -> the table's column)
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows, of all batches read so far

    @cached_property
    def rows(self) -> int:
        """The rows of the files. Parquet files store their number; other files are read once to count."""
        return sum(table.rows() for table, _ in self._tables)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of every batch: row, url, caption, then those that all files have."""
        return ("row", "url", "caption", *(x for x in EXTRA if all(x in names for _, names in self._tables)))

    def batches(self, size: int = 65_536, first: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
        """The usable rows from `first` to `stop`, in batches of at most `size`."""
        return (batch for batch, _ in self.batches_and_drops(size, first, stop))

    def batches_and_drops(self, size: int = 65_536, first: int = 0, stop: int | None = None) -> Iterator[BatchAndDrops]:
        """The same batches, each with its unusable rows."""
        start = 0  # of this file
        for number, (table, names) in enumerate(self._tables):
            if stop is not None and start >= stop:
                return
            # Only a parquet file's rows can be counted without reading it.
            rows = table.rows() if isinstance(table, ParquetTable) or first > start else None
            if rows is not None and start + rows <= first:
                start += rows
                continue
            row = max(first, start)
            source = dict.fromkeys(names.values())
            for raw in table.batches(tuple(source), size, row - start):
                if stop is not None and row + raw.num_rows > stop:
                    raw = raw.slice(0, stop - row)
                yield self._canonical(raw, names, row)
                row += raw.num_rows
                if stop is not None and row >= stop:
                    return
            assert rows is None or row == start + rows, f"file {number} changed while it was read"
            start = row

    def _canonical(self, raw: pa.RecordBatch, names: Mapping[str, str], row: int) -> BatchAndDrops:
        reasons, url, caption = _check(raw, names)
        numbers = raw.column(names["row"]) if "row" in names else pa.array(np.arange(row, row + raw.num_rows))
        columns = [numbers.cast(pa.int64()), url, caption]
        for name in self.columns[3:]:
            columns.append(_extra(raw.column(names[name]), EXTRA[name]))
        usable = pa.array(reasons < 0)
        why = [REASONS[index] for index in reasons[reasons >= 0]]
        self.dropped.update(why)
        lines = [columns[0].filter(pc.invert(usable)), pa.array(why, pa.string())]
        drops = pa.RecordBatch.from_arrays(lines, names=["row", "reason"])
        batch = pa.RecordBatch.from_arrays([column.filter(usable) for column in columns], names=list(self.columns))
        return batch, drops


def _check(raw: pa.RecordBatch, names: Mapping[str, str]) -> tuple[np.ndarray, pa.Array, pa.Array]:
    """(for each row the index of the reason why it is unusable, or -1; urls; captions)."""
    url, no_url, long_url = _text(raw.column(names["url"]), MAX_URL_BYTES)
    if "caption" in names:
        caption, no_caption, long_caption = _text(raw.column(names["caption"]), MAX_CAPTION_BYTES)
    else:  # pictures alone
        caption = pa.array([""] * raw.num_rows, pa.string())
        no_caption = long_caption = np.zeros(raw.num_rows, bool)
    url, url_broken, url_nul = _decode(url)
    caption, caption_broken, caption_nul = _decode(caption)
    url, caption = pc.utf8_trim_whitespace(url), pc.utf8_trim_whitespace(caption)
    no_url |= _true(pc.equal(url, "")) & ~(url_broken | url_nul | long_url)
    if "caption" in names:
        no_caption |= _true(pc.equal(caption, "")) & ~(caption_broken | caption_nul | long_caption)
    bad = np.zeros(raw.num_rows, bool)
    if PROBLEM in raw.schema.names:
        bad = _true(raw.column(PROBLEM).is_valid())
    masks = (bad, no_url, long_url, long_caption, url_broken | caption_broken, url_nul | caption_nul, no_caption)
    return np.select(masks, range(len(REASONS)), -1), url, caption


def _text(column: pa.Array, limit: int) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """(bytes, empty where they were too long; which are null; which were too long)."""
    if isinstance(column.type, pa.DictionaryType):
        column = column.dictionary_decode()
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            column = column.cast(pa.string())
        column = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
    long = _true(pc.greater(pc.binary_length(column), limit))
    empty = _true(column.is_null())
    if long.any():  # drop 10 MB captions before they slow down the rest
        column = pc.if_else(pa.array(long), pa.scalar(b"", column.type), column)
    return column, empty, long


def _decode(column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """(strings; which are not UTF-8; which contain a NUL)."""
    broken = np.zeros(len(column), bool)
    if not pa.types.is_string(column.type):
        try:
            column = column.cast(pa.string())
        except pa.ArrowInvalid:
            values = [_utf8(value) for value in column.to_pylist()]
            broken = np.array([value is None for value in values], bool) & _true(column.is_valid())
            column = pa.array(values, pa.string())
    return column.fill_null(""), broken, _true(pc.match_substring(column, "\0"))


def _utf8(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _extra(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """The column as `kind`; values that cannot be converted are null."""
    if pa.types.is_string(kind):
        text, _, long = _text(column, 64)
        text, broken, _ = _decode(text)
        return pc.if_else(pa.array(long | broken | _true(pc.equal(text, ""))), pa.scalar(None, kind), text)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        column = pa.array([_number(value) for value in column.to_pylist()], pa.float64())
    column = column.cast(pa.float64(), safe=False)
    column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64()))
    if kind == pa.int64():
        column = pc.if_else(pc.less(pc.abs(column), 2.0**53), column, pa.scalar(None, pa.float64()))
    return column.cast(kind, safe=False)


def _number(value: object) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _true(mask: pa.Array) -> np.ndarray:
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)


def open_list(
    paths: Sequence[str | Path], preset: str, url_col: str | None = None, caption_col: str | None = None
) -> List:
    """Opens the list in `paths` (files, or directories of them). Raises ValueError for an unknown preset, wrong columns
    (naming the existing ones), an unexpected or missing header, and a list without rows."""
    if preset not in PRESETS:
        raise ValueError(f"--preset={preset} does not exist; use one of {', '.join(PRESETS)}")
    names = PRESETS[preset]
    if url_col is not None or caption_col is not None:
        names = names._replace(
            url=(url_col.lower(),) if url_col else names.url,
            caption=(caption_col.lower(),) if caption_col else names.caption,
        )
    if not names.url:
        raise ValueError("--preset=generic needs --url-col, and --caption-col if there are captions")
    files = _files(paths)
    tables = _special(files, preset) or [_open(path, names) for path in files]
    opened = List(preset, [(table, _columns(table, names, preset)) for table in tables])
    if not any(_first(table) for table in tables):
        raise ValueError(f"{_describe(files)} has no rows; check the file, and that it was downloaded completely")
    for table, columns in opened._tables:
        _check_urls(table, columns, names, preset)
    return opened


def fingerprint(paths: Sequence[str | Path]) -> str:
    """Changes with the names and sizes of a list's files, not with their location."""
    lines = (f"{path.name}\t{path.stat().st_size}\n" for path in _files(paths))
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _files(paths: Sequence[str | Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"--list={path} does not exist; check the path")
        if path.is_dir():
            inside = sorted(entry for entry in path.iterdir() if entry.is_file() and _format(entry) in FORMATS)
            # Step records and similar files may lie beside parquet files.
            inside = [entry for entry in inside if _format(entry) == ".parquet"] or inside
            if not inside:
                raise ValueError(f"--list={path} contains no file of {', '.join(FORMATS)}; give the files themselves")
            files += inside
        else:
            files.append(path)
    return files


def _format(path: Path) -> str:
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()


def _special(files: list[Path], preset: str) -> list[Table] | None:
    if not all(_format(path) == ".json" for path in files):
        return None
    if preset == "coco":
        return [coco_captions(path) for path in files]
    if preset == "sbu":
        return [sbu_captions(path) for path in files]
    return [visual_genome(files)] if preset == "visual_genome" else None


def _open(path: Path, preset: Preset) -> Table:
    kind = _format(path)
    if kind == ".parquet":
        return ParquetTable(path)
    if kind == ".tsv" or (preset.header and kind in (".txt", ".csv")):
        return tab_separated(path, preset.header)
    if kind == ".csv":
        return comma_separated(path)
    if kind in (".jsonl", ".ndjson"):
        return json_lines(path)
    if kind == ".json":
        return json_array(path)
    raise ValueError(f"--list={path} ends in {kind or 'nothing'}; give a list of {', '.join(FORMATS)}, or one with .gz")


def _columns(table: Table, preset: Preset, name: str) -> dict[str, str]:
    """Canonical name -> the table's name."""
    lower = {column.lower(): column for column in reversed(table.columns)}
    columns = {"url": _pick(lower, preset.url), "caption": _pick(lower, preset.caption)}
    if columns["url"] is None or (columns["caption"] is None and preset.caption):
        missing = " or ".join(preset.url if columns["url"] is None else preset.caption)
        raise ValueError(
            f"{table.path} has no column {missing}; it has {', '.join(map(repr, table.columns)) or 'none'}; "
            "choose another --preset, or name them with --url-col and --caption-col"
        )
    columns |= {canonical: _pick(lower, names) for canonical, names in _NAMES.items()}
    if name == "canonical" and "row" in lower:
        columns["row"] = lower["row"]
    return {canonical: column for canonical, column in columns.items() if column is not None}


def _pick(columns: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)


def _first(table: Table) -> bool:
    return any(batch.num_rows for batch in table.batches(table.columns[:1], 1))


def _check_urls(table: Table, names: Mapping[str, str], preset: Preset, name: str) -> None:
    """Makes a list with swapped columns fail here and not after a million requests."""
    batch = next(table.batches(tuple(dict.fromkeys(names.values())), _LOOK_AT), None)
    if batch is None or batch.num_rows == 0:
        return
    _, urls, captions = _check(batch, names)
    if preset.header and urls[0].as_py().lower() in ("url", "image_url"):
        raise ValueError(
            f"{table.path} begins with a header ({urls[0]}, {captions[0]}), but --preset={name} expects none; use "
            f"--preset=generic --url-col={urls[0]} --caption-col={captions[0]}"
        )
    if any("://" in url for url in urls.to_pylist()):
        return
    swapped = any("://" in caption for caption in captions.to_pylist())
    hint = "its captions are URLs, so the columns are swapped" if swapped else "check the columns"
    raise ValueError(
        f"{table.path} has no URL among the first {len(urls)} of {names['url']!r} (the first is "
        f"{urls[0].as_py()!r:.60}); {hint}: choose another --preset, or --url-col and --caption-col"
    )


def _describe(files: Sequence[Path]) -> str:
    return str(files[0]) if len(files) == 1 else f"--list ({files[0]} and {len(files) - 1} more)"
