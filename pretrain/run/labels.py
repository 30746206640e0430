"""Whether the sets of a stage call their classes by the same numbers: a test set that was converted by itself may not,
and nothing but a bad score would tell."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.data.labelled import LabelledShards
from pretrain.json_files import read_json
from pretrain.run.evaluation import sources
from pretrain.settings import fill_variables

LABELS = "labels.json"  # of data_tools.from_table, beside the shards or above the splits


def check_labels(stage: Any) -> None:
    """ValueError where the label names of two labelled sources differ, as far as they lie on a disk beside them."""
    known: tuple[Path, list[str]] | None = None
    for source in sources((stage.mix, stage.evals)):
        for path, names in _labels_of(source):
            if known is not None and names != known[1]:
                number, own, other = _first_difference(known[1], names)
                raise ValueError(
                    f"{known[0]} calls class {number} {own} and {path} calls it {other}, so their numbers do not mean "
                    f"the same; convert the second set again with data_tools.from_table --labels {known[0]}"
                )
            known = known or (path, names)


def _labels_of(source: Any) -> Iterable[tuple[Path, list[str]]]:
    if not isinstance(source, LabelledShards):
        return
    for shards in [source.shards] if isinstance(source.shards, str) else source.shards:
        try:
            place = Path(fill_variables(shards, "shards")).expanduser()
        except ValueError:  # a variable that is not set: whoever reads the shards says so
            continue
        for path in (place / LABELS, place.parent / LABELS):
            if path.is_file():
                names = read_json(path)
                if isinstance(names, list) and all(isinstance(name, str) for name in names):
                    yield path, names
                break


def _first_difference(names: list[str], others: list[str]) -> tuple[int, str, str]:
    longer = max(len(names), len(others))
    padded = ([*map(repr, some), *["nothing"] * (longer - len(some))] for some in (names, others))
    return next((n, a, b) for n, (a, b) in enumerate(zip(*padded, strict=True)) if a != b)
