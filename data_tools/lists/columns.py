"""Checks the raw columns of a list: which rows have a usable URL and caption, and as which text.

Where a picture has a list of captions, its caption is the first usable one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.inputs.tables import texts_in

# Servers reject longer ones; longer ones are mostly data: URLs.
MAX_URL_BYTES = 8192
MAX_CAPTION_BYTES = 65_536  # of one, and of all of a picture together
PROBLEM = "_problem"  # the raw column that says why a row cannot be parsed
BAD_ROW = "bad_row"
REASONS = (BAD_ROW, "empty_url", "long_url", "long_caption", "not_utf8", "nul_byte", "empty_caption")
NUMBERS = {"similarity": pa.float64(), "punsafe": pa.float64(), "pwatermark": pa.float64()}
NUMBERS |= {"width": pa.int64(), "height": pa.int64()}
EXTRA = {**NUMBERS, "language": pa.string()}
_MAX_SHOWN = 60  # characters of a type


class Checked(NamedTuple):
    reasons: np.ndarray  # int [rows]: the index in REASONS of why it is unusable, or -1
    url: pa.Array
    caption: pa.Array
    captions: pa.Array | None  # lists of all usable captions


class _Texts(NamedTuple):
    """Decoded texts, and which of them are unusable for which reason (bool [texts])."""

    text: pa.Array  # without blanks around it
    empty: np.ndarray
    long: np.ndarray
    not_utf8: np.ndarray
    nul: np.ndarray

    @property
    def usable(self) -> np.ndarray:
        return ~(self.empty | self.long | self.not_utf8 | self.nul)


def check_type(path: Path, name: str, kind: pa.DataType, *, lists: bool) -> None:
    """Raises ValueError unless a column of this type holds texts or, if `lists`, lists of texts."""
    inner = _plain_type(kind)
    if lists and _is_list(inner):
        inner = _plain_type(inner.value_type)
    if not (pa.types.is_null(inner) or _is_text(inner)):
        shown = str(kind) if len(str(kind)) <= _MAX_SHOWN else f"{str(kind)[:_MAX_SHOWN]}..."
        raise ValueError(
            f"the column {name!r} of {path} has the type {shown}, not text{' or lists of texts' if lists else ''}; "
            "choose another with --url-col or --caption-col, or write that one as text"
        )


def check(raw: pa.RecordBatch, names: Mapping[str, str], *, all_captions: bool = False) -> Checked:
    """`names`: canonical name -> raw column; without a caption among them the list has pictures alone."""
    url = _texts(raw.column(names["url"]), MAX_URL_BYTES)
    none = np.zeros(raw.num_rows, bool)
    captions = None
    if "caption" in names:
        caption, captions = _captions(raw.column(names["caption"]), all_captions)
    else:
        caption = _Texts(pa.array([""] * raw.num_rows, pa.string()), none, none, none, none)
    bad = as_bools(raw.column(PROBLEM).is_valid()) if PROBLEM in raw.schema.names else none
    broken, nul = url.not_utf8 | caption.not_utf8, url.nul | caption.nul
    masks = (bad, url.empty, url.long, caption.long, broken, nul, caption.empty)
    return Checked(np.select(masks, range(len(REASONS)), -1), url.text, caption.text, captions)


def _captions(column: pa.Array, all_captions: bool) -> tuple[_Texts, pa.Array | None]:
    """(the caption of each row, the lists of all of them)."""
    values, rows = _elements(column)
    texts = _texts(values, MAX_CAPTION_BYTES)
    if rows is None:
        if not all_captions:
            return texts, None
        rows = np.arange(len(column))
    usable = texts.usable
    # The first text of each row speaks for it, and before that its first usable one.
    place = np.full(len(column), -1)
    for places in (np.arange(len(rows)), np.flatnonzero(usable)):
        which, first = np.unique(rows[places], return_index=True)
        place[which] = places[first]
    some = place >= 0
    first_text = texts.text.take(pa.array(place, mask=~some)).fill_null("")
    masks = (np.where(some, np.append(mask, False)[place], False) for mask in texts[1:])
    empty, long, not_utf8, nul = masks
    lists = None
    if all_captions:
        sizes = pc.binary_length(texts.text).to_numpy(zero_copy_only=False)[usable]
        long |= np.bincount(rows[usable], sizes, len(column)) > MAX_CAPTION_BYTES
        ends = np.cumsum(np.bincount(rows[usable], minlength=len(column)), dtype=np.int32)
        offsets = pa.array(np.concatenate([np.zeros(1, np.int32), ends]))
        lists = pa.ListArray.from_arrays(offsets, texts.text.filter(pa.array(usable)))
    return _Texts(first_text, empty | ~some, long, not_utf8, nul), lists


def _elements(column: pa.Array) -> tuple[pa.Array, np.ndarray | None]:
    """(the texts of a column of lists, the row of each); (the column, None) if it has a text in each row."""
    column = _plain(column)
    if not _is_list(column.type):
        if not (parsed := _written_lists(column)):
            return column, None
        texts = [parsed.get(n, [text]) for n, text in enumerate(column.to_pylist())]
        column = pa.array(texts, pa.large_list(pa.large_binary()))
    rows = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    return _plain(pc.list_flatten(column)), rows


def _written_lists(column: pa.Array) -> dict[int, list[bytes]]:
    """row -> the texts of its cell, where that is a list of texts in JSON or Python."""
    column = _as_bytes(column)
    like_one = as_bools(pc.and_(pc.starts_with(column, b"["), pc.ends_with(column, b"]")))
    lists = {}
    for row in np.flatnonzero(like_one & ~as_bools(pc.greater(pc.binary_length(column), MAX_CAPTION_BYTES))).tolist():
        if (text := _utf8(column[row].as_py())) is not None and (texts := texts_in(text)) is not None:
            lists[row] = [each.encode("utf-8", "surrogatepass") for each in texts]
    return lists


def _texts(column: pa.Array, limit: int) -> _Texts:
    column = _as_bytes(_plain(column))
    long = as_bools(pc.greater(pc.binary_length(column), limit))
    empty = as_bools(column.is_null())
    if long.any():  # drop 10 MB captions before they slow down the rest
        column = pc.if_else(pa.array(long), pa.scalar(b"", column.type), column)
    text, not_utf8, nul = _decode(column)
    text = pc.utf8_trim_whitespace(text)
    return _Texts(text, empty | (as_bools(pc.equal(text, "")) & ~(not_utf8 | nul | long)), long, not_utf8, nul)


def _as_bytes(column: pa.Array) -> pa.Array:
    if pa.types.is_null(column.type):
        return column.cast(pa.binary())
    return column.cast(pa.binary() if pa.types.is_string(column.type) else pa.large_binary())


def _decode(column: pa.Array) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """(strings; which are not UTF-8; which contain a NUL)."""
    broken = np.zeros(len(column), bool)
    try:
        column = column.cast(pa.string())
    except pa.ArrowInvalid:
        values = [_utf8(value) for value in column.to_pylist()]
        broken = np.array([value is None for value in values], bool) & as_bools(column.is_valid())
        column = pa.array(values, pa.string())
    return column.fill_null(""), broken, as_bools(pc.match_substring(column, "\0"))


def _utf8(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _plain_type(kind: pa.DataType) -> pa.DataType:
    while isinstance(kind, pa.DictionaryType | pa.BaseExtensionType):
        kind = kind.value_type if isinstance(kind, pa.DictionaryType) else kind.storage_type
    return kind


def _plain(column: pa.Array) -> pa.Array:
    """The values themselves of a column that is encoded by a dictionary, or has a type of its own."""
    while isinstance(column.type, pa.DictionaryType | pa.BaseExtensionType):
        if isinstance(column.type, pa.DictionaryType):
            column = column.dictionary.take(column.indices)  # dictionary_decode knows no lists
        else:
            column = column.storage
    return column


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return strings or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def extra(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """The column as `kind`, a type of EXTRA; values that cannot be converted are null."""
    column = _plain(column)
    if pa.types.is_string(kind):
        if not (_is_text(column.type) or pa.types.is_null(column.type)):
            return pa.nulls(len(column), kind)
        texts = _texts(column, 64)
        return pc.if_else(pa.array(texts.usable), texts.text, pa.scalar(None, kind))
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
    except (TypeError, ValueError, OverflowError):
        return None


def as_bools(mask: pa.Array) -> np.ndarray:
    """bool [rows]; null counts as False."""
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
