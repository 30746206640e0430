"""Checks that a stage's labelled sources number their classes alike, and that its vocabulary of answers has answers of
its questions. Nothing but a bad score would show it otherwise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.data.answers import scores
from pretrain.data.labelled import LabelledShards, QuestionShards, metadata, read_vocabulary
from pretrain.data.shards.manifest import MANIFEST, load_manifest
from pretrain.data.shards.reader import BadSample, ShardReader
from pretrain.data.sources import METADATA
from pretrain.json_files import read_json
from pretrain.run.evaluation import sources
from pretrain.settings import fill_variables

LOOKED_AT = 200  # questions of each shard
LABELS = "labels.json"  # written by data_tools.from_table, beside the shards or in the directory above the splits


def check_labels(stage: Any) -> None:
    """ValueError if the label names of two labelled sources differ, or if no question's answer is in the vocabulary.
    Only sources with shards in a directory, and not by URL, are checked."""
    known: tuple[Path, list[str]] | None = None
    for source in sources((stage.mix, stage.evals)):
        if isinstance(source, QuestionShards):
            _check_answers(source)
        for path, names in _labels_of(source):
            if known is not None and names != known[1]:
                number, own, other = _first_difference(known[1], names)
                raise ValueError(
                    f"{known[0]} calls class {number} {own} and {path} calls it {other}, so their numbers do not mean "
                    f"the same; convert the second set again with data_tools.from_table --labels {known[0]}"
                )
            known = known or (path, names)


def _labels_of(source: Any) -> Iterable[tuple[Path, list[str]]]:
    """The files of label names of a labelled source, and the names in the order of the class numbers."""
    if not isinstance(source, LabelledShards):
        return
    for place in _places(source):
        for path in (place / LABELS, place.parent / LABELS):
            if path.is_file():
                names = read_json(path)
                if isinstance(names, list) and all(isinstance(name, str) for name in names):
                    yield path, names
                break


def _places(source: Any) -> Iterator[Path]:
    """Those of a source's shards that are directories."""
    for shards in [source.shards] if isinstance(source.shards, str) else source.shards:
        with suppress(ValueError):  # a variable that is not set is reported when the shards are read
            if (place := Path(fill_variables(shards, "shards")).expanduser()).is_dir():
                yield place


def _check_answers(source: QuestionShards) -> None:
    """ValueError if the vocabulary has none of the answers of the first questions."""
    asked, given = 0, set[str]()
    for place in _places(source):
        if not (place / MANIFEST).is_file():
            continue
        reader = ShardReader(load_manifest(str(place)))
        for shard, count in enumerate(reader.manifest.counts):
            for sample in range(min(count, LOOKED_AT - asked)):
                with suppress(BadSample):
                    answers = metadata(reader.read(shard, sample, (METADATA,))).get("answers")
                    if isinstance(answers, list):
                        asked += 1
                        given |= scores([each for each in answers if isinstance(each, str)]).keys()
    if given and not given & read_vocabulary(source.vocabulary).keys():
        raise ValueError(
            f"vocabulary={source.vocabulary} has none of the answers of {asked} questions in {source.shards}, such as "
            f"{min(given)[:40]!r}; write the set's own with python -m data_tools.answers"
        )


def _first_difference(names: list[str], others: list[str]) -> tuple[int, str, str]:
    """The first class number whose names differ, and both names."""
    longer = max(len(names), len(others))
    padded = ([*map(repr, some), *["nothing"] * (longer - len(some))] for some in (names, others))
    return next((n, a, b) for n, (a, b) in enumerate(zip(*padded, strict=True)) if a != b)
