"""Whether the sets of a stage call their classes by the same numbers, and whether the answers that a stage can give are
those of its questions: where they are not, nothing but a bad score would tell."""

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

LOOKED_AT = 200  # questions
LABELS = "labels.json"  # of data_tools.from_table, beside the shards or above the splits


def check_labels(stage: Any) -> None:
    """ValueError where the label names of two labelled sources differ, or no question's answer is in the vocabulary, as
    far as this lies on a disk beside the shards."""
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
    """Directories of its shards, as far as they are some on a disk."""
    for shards in [source.shards] if isinstance(source.shards, str) else source.shards:
        with suppress(ValueError):  # a variable that is not set: whoever reads the shards says so
            if (place := Path(fill_variables(shards, "shards")).expanduser()).is_dir():
                yield place


def _check_answers(source: QuestionShards) -> None:
    """ValueError where none of the first questions' answers can be given."""
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
    longer = max(len(names), len(others))
    padded = ([*map(repr, some), *["nothing"] * (longer - len(some))] for some in (names, others))
    return next((n, a, b) for n, (a, b) in enumerate(zip(*padded, strict=True)) if a != b)
