"""One picture with what is known of it, on its way from a user's files into shards."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.inputs.tables import texts_in
from pretrain.data.shards.tar_index import IMAGE_EXTENSIONS

ENDINGS = frozenset((*IMAGE_EXTENSIONS, "gif", "bmp", "avif"))  # what write_records can read
SPLITS = {"train", "val", "valid", "validation", "dev", "test", "heldout"}
MAX_CAPTION = 65_536  # characters; a longer one is no caption
MAX_CAPTIONS = 1000  # of one picture


class Cell(NamedTuple):
    """A picture's bytes in a table: row `row` of group `group` of a parquet file (of a whole arrow file: group 0)."""

    file: Path
    column: str
    group: int
    row: int


@dataclass(frozen=True)
class Record:
    """`name`: where it comes from, for messages and its JSON. `label`: its name, or a number where there are no names.
    `pictures`: one, or two where a text is about both. `facts`: further values for its JSON."""

    name: str
    pictures: tuple[Path | Cell, ...]
    captions: tuple[str, ...] = ()
    label: str | int | None = None
    split: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


class Unusable(NamedTuple):
    """What could not become a record: where it stands, a short reason, and the details."""

    name: str
    reason: str
    detail: str


class Pictures:
    """The picture files under a folder, by the names that a table has for them."""

    def __init__(self, root: Path):
        self.root = root.resolve()

    @cached_property
    def _by_name(self) -> dict[str, Path | None]:
        """{a file's name, or "#" and the number at its end: the file}; None where several files have it."""
        files: dict[str, Path | None] = {}
        for path in picture_files(self.root):
            number = path.stem[len(path.stem.rstrip("0123456789")) :]
            for key in (path.name, f"#{number.lstrip('0') or '0'}") if number else (path.name,):
                files[key] = None if key in files else path
        return files

    def find(self, name: str) -> Path:
        """A path below the folder, or the name of one file in it. Raises ValueError."""
        path = Path(os.path.realpath(self.root / name))  # Path.resolve raises RuntimeError for links in a circle
        try:
            if path.is_relative_to(self.root) and path.is_file():
                return path
        except OSError:  # too long a name for any file, as where a caption stands in the picture's column
            pass
        if "\0" not in name and (file := self._by_name.get(Path(name).name)) is not None:
            return file
        outside = "" if path.is_relative_to(self.root) else ", where it must lie"
        raise ValueError(f"{name[:200]!r} is no file below {self.root}{outside}")

    def numbered(self, number: int) -> Path:
        """The file whose name ends with this number, as COCO's do. Raises ValueError."""
        if (file := self._by_name.get(f"#{number}")) is None:
            raise ValueError(f"picture {number}: no file below {self.root}, or more than one, ends with this number")
        return file


def picture_files(root: Path) -> Iterator[Path]:
    """The picture files below `root`, in the order of their names, without hidden files and folders."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in ENDINGS and not name.startswith("."):
                yield Path(folder, name)


def captions_of(value: Any) -> tuple[str, ...]:
    """A cell of captions: a text, a list of texts (also as JSON or as Python prints one), None -> texts that are not
    blank. ValueError for anything else."""
    if value is None or (isinstance(value, float) and value != value):  # pandas' NaN for no text
        return ()
    if isinstance(value, str):
        value = texts_in(value) or [value]
    if not isinstance(value, list) or not all(isinstance(text, str | None) for text in value):
        raise ValueError(f"{str(value)[:60]!r} is no text and no list of texts")
    texts = tuple(text.strip() for text in value if text is not None and text.strip())
    if len(texts) > MAX_CAPTIONS or any(len(text) > MAX_CAPTION for text in texts):
        raise ValueError(f"it has over {MAX_CAPTIONS} captions, or one of over {MAX_CAPTION} characters")
    if any("\0" in text or "\ufffd" in text or not _is_unicode(text) for text in texts):
        raise ValueError("a caption of it is not UTF-8 text")
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label_of(value: Any) -> str | int | None:
    """A cell of labels. ValueError for what is neither a name nor a whole number."""
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str | int) or (isinstance(value, int) and not 0 <= value < 2**31):
        raise ValueError(f"{str(value)[:60]!r} is no label; use a name or a whole number from 0 on")
    text = value.strip() if isinstance(value, str) else value
    return int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 10 else text


def joined(records: Iterable[Record | Unusable]) -> Iterator[Record | Unusable]:
    """The rows of one picture file as one record with all their captions, in the order of the first ones. Rows that
    contradict it in label or split are unusable. Pictures in cells, and those with facts of their own, stay apart."""
    groups: dict[Path, list[Record]] = {}
    for record in records:
        file = record.pictures[0] if isinstance(record, Record) else None
        if isinstance(record, Record) and isinstance(file, Path) and len(record.pictures) == 1 and not record.facts:
            groups.setdefault(file, []).append(record)
        else:
            yield record
    for first, *others in groups.values():
        captions = list(first.captions)
        for other in others:
            if (other.label, other.split) != (first.label, first.split):
                yield Unusable(other.name, "contradiction", f"{first.name} has another label or split for its picture")
            else:
                captions += other.captions
        yield replace(first, captions=tuple(captions[:MAX_CAPTIONS]))
