"""What from_table is going to write: the usable records by split, shuffled, and the labels' names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.inputs.text_stream import check_regular
from data_tools.pictures.recode import Recode
from data_tools.records.annotations import read_annotations
from data_tools.records.folder import read_folder
from data_tools.records.record import Pictures, Record, Unusable, joined
from data_tools.records.rows import (
    COMPRESSED,
    TABLES,
    ColumnOptions,
    Reading,
    dataset_files,
    json_kind,
    read_datasets,
    read_table,
)
from pretrain.json_files import read_json

NAME = 64  # characters of a split's name, at most
MOST_LABELS = 1_000_000  # by number; a column of ids would claim billions


@dataclass(frozen=True)
class Settings:
    """The options of from_table that decide what it writes: a run goes on only with the same ones."""

    input: Path
    pictures: Path | None = None
    picture_col: str = ""
    caption_col: tuple[str, ...] = ()
    label_col: str = ""
    split_col: str = ""
    label_folders: bool = False
    labels: Path | None = None
    answers: Path | None = None
    held_out: float = 0.0
    seed: int = 0
    max_side: int | None = None
    quality: int = 95
    samples_per_shard: int = 1000

    def __post_init__(self) -> None:
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard {self.samples_per_shard} is below 1; use 1000")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"--held-out {self.held_out} is no share; use at least 0 and less than 1, such as 0.05")
        if self.seed < 0:
            raise ValueError(f"--seed {self.seed} is negative; use 0 or more")
        Recode(self.max_side, quality=self.quality)
        for name in ("input", "pictures", "labels", "answers"):
            path = getattr(self, name)
            if path is not None and not path.exists():
                option = name if name == "input" else f"--{name}"
                raise ValueError(f"{option} {path} does not exist; check the path")

    def as_json(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    @property
    def columns(self) -> ColumnOptions:
        return ColumnOptions(self.picture_col, self.caption_col, self.label_col, self.split_col)


@dataclass(frozen=True)
class Plan:
    splits: dict[str, list[Record]]
    unusable: list[Unusable]
    names: tuple[str, ...]  # of the labels

    @property
    def digest(self) -> str:
        """A hash of the records, so that a run goes on only with the same ones."""
        digest = hashlib.sha256(repr(self.names).encode("utf-8", "replace"))
        for split, records in self.splits.items():
            digest.update(repr((split, records)).encode("utf-8", "replace"))
        return digest.hexdigest()[:16]


def make_plan(settings: Settings) -> Plan:
    """ValueError for input that cannot be read."""
    rows, known = _read(settings)
    found = list(joined(rows))
    records = [record for record in found if isinstance(record, Record)]
    unusable = [one for one in found if isinstance(one, Unusable)]
    if not records:
        first = f" (the first: {unusable[0].name}: {unusable[0].detail})" if unusable else ""
        raise ValueError(f"{settings.input} has no usable record{first}; mend it, or give another")
    names = _label_names(records, known, settings)
    if settings.labels is None and known is None and any(isinstance(record.label, str) for record in records):
        # A name such as 7 among others is no number.
        records = [r if r.label is None else replace(r, label=str(r.label)) for r in records]
    splits: dict[str, list[Record]] = {}
    for record in records:
        problem = _label_problem(record, names)
        if problem:
            unusable.append(Unusable(record.name, "bad_label", problem))
            continue
        split = record.split or ("" if not settings.held_out else _draw_split(record, settings))
        is_name = split.replace("_", "").replace("-", "").isalnum() and split.isascii() and len(split) <= NAME
        if split and not is_name:
            raise ValueError(f"{record.name}: {split[:NAME]!r} is no name of a split; use letters, digits, _ and -")
        splits.setdefault(split, []).append(record)
    if "" in splits and len(splits) > 1:
        splits["unsplit"] = splits.pop("")
    if settings.held_out and any(record.split for record in records):
        raise ValueError("--held-out: these records have splits of their own; leave it out")
    return Plan({split: _shuffled(splits[split], settings.seed) for split in sorted(splits)}, unusable, names)


def _read(settings: Settings) -> Reading:
    path = settings.input
    root = settings.pictures or (path if path.is_dir() else path.parent)
    if not root.is_dir():
        raise ValueError(f"--pictures {root} is not a directory; give the folder of the pictures")
    pictures = Pictures(root)
    if settings.answers is not None and (path.is_dir() or path.suffix.lower() != ".json"):
        raise ValueError(f"--answers belongs to VQAv2's file of questions, which {path} is not; leave it out")
    if path.is_dir():
        if dataset_files(path):
            return read_datasets(path, pictures, settings.columns)
        return read_folder(path, label_folders=settings.label_folders), None
    check_regular(path, str(path))
    if settings.label_folders:
        raise ValueError(f"--label-folders belongs to a folder of pictures, and {path} is a file; leave it out")
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    if name.endswith(".json") and json_kind(path) == "object":
        return read_annotations(path, pictures, settings.answers), None
    if not name.endswith((*TABLES, ".json")):
        raise ValueError(f"{path} is neither a folder nor one of {', '.join((*TABLES, '.json'))}; give one of these")
    return read_table(path, pictures, settings.columns)


def _label_names(records: list[Record], known: Sequence[str] | None, settings: Settings) -> tuple[str, ...]:
    """The labels' names by number: those of --labels, else those that the files know (`known`), else the names of the
    records in the order of the alphabet, or their numbers as they are."""
    if settings.labels is not None:
        names = read_json(settings.labels)
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"--labels {settings.labels} is no list of names; give a labels.json of from_table")
        return tuple(names)
    if known is not None:
        return tuple(known)
    labels = {record.label for record in records if record.label is not None}
    numbers = [label for label in labels if isinstance(label, int)]
    if len(numbers) == len(labels):
        if max(numbers, default=0) >= MOST_LABELS:
            raise ValueError(
                f"the labels are numbers up to {max(numbers)}, and at most {MOST_LABELS:,} classes are made of "
                "numbers; choose another --label-col, or give their names with --labels"
            )
        return tuple(str(number) for number in range(max(numbers, default=-1) + 1))
    return tuple(sorted(map(str, labels)))


def _label_problem(record: Record, names: tuple[str, ...]) -> str:
    label = record.label
    if label is None or (isinstance(label, int) and label < len(names)) or label in names:
        return ""
    return f"its label {str(label)[:60]!r} is not among the {len(names)}, such as {names[0]!r}"


def _draw_split(record: Record, settings: Settings) -> str:
    """The split of a record, by its own name, so that further records don't change it. Where several records share a
    picture, as questions do, by the picture's name, so that no picture is on both sides."""
    picture = record.pictures[0]
    name = picture.name if record.facts and isinstance(picture, Path) else record.name
    digest = hashlib.sha256(f"{settings.seed}/{name}".encode("utf-8", "replace")).digest()
    return "heldout" if int.from_bytes(digest[:6], "big") / 2**48 < settings.held_out else "train"


def _shuffled(records: list[Record], seed: int) -> list[Record]:
    """In an order that depends only on their number and the seed: classes one after the other make bad batches."""
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[place] for place in order]
