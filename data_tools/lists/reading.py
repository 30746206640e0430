"""Reads lists of URLs and captions, in the formats in which they are published, as canonical batches.

Canonical columns: row (its number in the list, over all files), url, caption, and whichever of similarity, punsafe,
pwatermark, width, height and language the list has. A picture with several captions, in a column of lists, has the
first usable one as its caption, and on request all of them in the column captions. An unusable row is dropped and
counted under its reason.
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

from data_tools.inputs.text_stream import COMPRESSED, check_regular
from data_tools.lists.columns import EXTRA, PROBLEM, REASONS, check, extra
from data_tools.lists.formats import ParquetTable, arrow_errors, delimited, json_array, json_lines
from data_tools.lists.json_formats import coco_captions, sbu_captions, visual_genome

CAPTIONS = "captions"  # the canonical column of all captions of a picture, and its name in a sample's JSON
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
    "canonical": Preset(
        "what data_tools.filter_list writes: parquet with row, url, caption", caption=(CAPTIONS, "caption")
    ),
    "generic": Preset("any parquet, csv, tsv, jsonl or json, with --url-col and --caption-col", (), ()),
}
FORMATS = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")


class Table(Protocol):
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def path(self) -> Path: ...
    def rows(self) -> int: ...
    def batches(
        self, columns: Sequence[str], size: int, first: int = 0, texts: Mapping[str, bool] | None = None
    ) -> Iterator[pa.RecordBatch]: ...


@dataclass
class List:
    """An open list. Reading it fills `dropped` and `first_bad_row`."""

    preset: str
    _tables: list[tuple[Table, Mapping[str, str]]]  # (table, canonical column -> the table's column)
    all_captions: bool = False
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows, of all batches read so far
    first_bad_row: str = ""  # its file and line, and what is wrong with it

    @cached_property
    def rows(self) -> int:
        """The rows of the files. Parquet files store their number; other files are read once to count."""
        return sum(table.rows() for table, _ in self._tables)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of every batch: row, url, caption, captions if requested, then those that all files have."""
        captions = (CAPTIONS,) if self.all_captions else ()
        extras = (name for name in EXTRA if all(name in names for _, names in self._tables))
        return ("row", "url", "caption", *captions, *extras)

    def batches(self, size: int = 65_536, first: int = 0, stop: int | None = None) -> Iterator[pa.RecordBatch]:
        """The usable rows from `first` to `stop`, in batches of at most `size`."""
        return (batch for batch, _ in self.batches_and_drops(size, first, stop))

    def batches_and_drops(self, size: int = 65_536, first: int = 0, stop: int | None = None) -> Iterator[BatchAndDrops]:
        """The same batches, each with its unusable rows."""
        start = 0  # of this file
        for table, names in self._tables:
            if stop is not None and start >= stop:
                return
            # Only a parquet file's rows can be counted without reading it.
            rows = table.rows() if isinstance(table, ParquetTable) or first > start else None
            if rows is not None and start + rows <= first:
                start += rows
                continue
            row = max(first, start)
            for raw in _raw(table, names, size, row - start):
                if stop is not None and row + raw.num_rows > stop:
                    raw = raw.slice(0, stop - row)
                with arrow_errors(table.path, "has a column that cannot be read"):
                    batch = self._canonical(raw, names, row, table.path)
                yield batch
                row += raw.num_rows
                if stop is not None and row >= stop:
                    return
            if rows is not None and row != start + rows:
                raise ValueError(f"{table.path} changed while it was read; wait until it is complete, and start again")
            start = row

    def _canonical(self, raw: pa.RecordBatch, names: Mapping[str, str], row: int, path: Path) -> BatchAndDrops:
        reasons, url, caption, captions = check(raw, names, all_captions=self.all_captions)
        numbers = pa.array(np.arange(row, row + raw.num_rows))
        if "row" in names:
            numbers = pc.coalesce(extra(raw.column(names["row"]), pa.int64()), numbers)
        columns = [numbers, url, caption]
        for name in self.columns[3:]:
            columns.append(captions if name == CAPTIONS else extra(raw.column(names[name]), EXTRA[name]))
        usable = pa.array(reasons < 0)
        why = [REASONS[index] for index in reasons[reasons >= 0]]
        self.dropped.update(why)
        details = pa.array([""] * len(why), pa.string())
        if PROBLEM in raw.schema.names:
            problems = raw.column(PROBLEM).filter(pc.invert(usable))
            details = pc.fill_null(pc.binary_join_element_wise(f"{path.name}, ", problems, ""), "")
            self.first_bad_row = self.first_bad_row or next((each for each in details.to_pylist() if each), "")
        lines = [numbers.filter(pc.invert(usable)), pa.array(why, pa.string()), details]
        drops = pa.RecordBatch.from_arrays(lines, names=["row", "reason", "detail"])
        batch = pa.RecordBatch.from_arrays([column.filter(usable) for column in columns], names=list(self.columns))
        return batch, drops


def _raw(table: Table, names: Mapping[str, str], size: int, first: int = 0) -> Iterator[pa.RecordBatch]:
    texts = {names[name]: name == "caption" for name in ("url", "caption") if name in names}
    return table.batches(tuple(dict.fromkeys(names.values())), size, first, texts)


def open_list(
    paths: Sequence[str | Path],
    preset: str,
    url_col: str | None = None,
    caption_col: str | None = None,
    captions: str | None = None,
) -> List:
    """Opens the list in `paths` (files, or directories of them). `captions`: "first" or "all" of a picture; None: the
    first, but all that filter_list has kept. Raises ValueError for an unknown preset, wrong columns (naming the
    existing ones), an unexpected or missing header, and a list without rows."""
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
    tables = _special(files, preset, together=captions == "all") or [_open(path, names) for path in files]
    opened = List(preset, [(table, _columns(table, names, preset)) for table in tables])
    kept_all = preset == "canonical" and all(found.get("caption") == CAPTIONS for _, found in opened._tables)
    opened.all_captions = captions == "all" or (captions is None and kept_all)
    if opened.all_captions and not names.caption:
        raise ValueError("--captions=all needs --caption-col, the column of the captions")
    if not any(_has_rows(table, columns["url"]) for table, columns in opened._tables):
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
        check_regular(path, f"--list={path}")
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
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()


def _special(files: list[Path], preset: str, *, together: bool) -> list[Table] | None:
    if not all(_format(path) == ".json" for path in files):
        return None
    if preset == "coco":
        return [coco_captions(path, together=together) for path in files]
    if preset == "sbu":
        return [sbu_captions(path) for path in files]
    return [visual_genome(files, together=together)] if preset == "visual_genome" else None


def _open(path: Path, preset: Preset) -> Table:
    kind = _format(path)
    if kind == ".parquet":
        return ParquetTable(path)
    if kind == ".tsv" or (preset.header and kind in (".txt", ".csv")):
        return delimited(path, b"\t", preset.header)
    if kind == ".csv":
        return delimited(path, b",")
    if kind in (".jsonl", ".ndjson"):
        return json_lines(path)
    if kind == ".json":
        return json_array(path)
    raise ValueError(
        f"--list={path} ends in {kind or 'nothing'}; give a list of {', '.join(FORMATS)}, also with "
        f"{', '.join(COMPRESSED)}"
    )


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
    found = {canonical: column for canonical, column in columns.items() if column is not None}
    for column in found.values():
        if (times := table.columns.count(column)) > 1:
            raise ValueError(f"{table.path} has {times} columns called {column!r}; give each a name of its own")
    return found


def _pick(columns: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)


def _has_rows(table: Table, column: str) -> bool:
    return any(batch.num_rows for batch in table.batches((column,), 1))


def _check_urls(table: Table, names: Mapping[str, str], preset: Preset, name: str) -> None:
    """Makes a list with swapped columns fail here and not after a million requests."""
    batch = next(_raw(table, names, _LOOK_AT), None)
    if batch is None or batch.num_rows == 0:
        return
    with arrow_errors(table.path, "has a column that cannot be read"):
        _, urls, captions, _ = check(batch, names)
    if PROBLEM in batch.schema.names and not batch.column(PROBLEM).null_count:
        why = batch.column(PROBLEM)[0].as_py()
        raise ValueError(f"none of the first {len(urls)} rows of {table.path} can be read ({why}); check the columns")
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
