"""Sets whose labels mean something else are refused before anything is trained or scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.data.labelled import LabelledShards, QuestionShards
from pretrain.evals.labelled import QuestionAccuracy, TopAccuracy
from pretrain.evals.probe import Probe
from pretrain.run.labels import check_labels
from tests.toys import pair_sample, write_source


def labelled(place: Path, split: str, names: list[str] | None) -> LabelledShards:
    (place / split).mkdir(parents=True)
    if names is not None:
        (place / "labels.json").write_text(json.dumps(names))
    return LabelledShards(str(place / split), classes=3)


def stage(train: LabelledShards, *evals) -> SimpleNamespace:
    return SimpleNamespace(mix={"images": train}, evals=evals)


NAMES = ["bus", "cat", "dog"]


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["cat", "bus", "dog"], "calls class 0 'bus' and .* calls it 'cat'"),
        (["bus", "cat"], "calls class 2 'dog' and .* calls it nothing"),
        ([*NAMES, "owl"], "calls class 3 nothing and .* calls it 'owl'"),
    ],
)
def test_other_labels_are_one_sentence(tmp_path, others, said):
    train, test = labelled(tmp_path / "a", "train", NAMES), labelled(tmp_path / "b", "test", others)
    for asked in (TopAccuracy(test), Probe(train, test)):
        with pytest.raises(ValueError, match=f"{said}.*--labels {tmp_path}/a/labels.json"):
            check_labels(stage(train, asked))


@pytest.mark.parametrize("known", [["yes", "no"], ["w0", "w1"], ["Yes!"]])
def test_a_vocabulary_of_other_answers_is_one_sentence(tmp_path, known):
    asked = [pair_sample(f"q{n}", n) | {"json": json.dumps({"answers": ["yes"] * 9 + ["Maybe."]})} for n in range(3)]
    shards = write_source(tmp_path / "q", [asked[:2], [], asked[2:]])
    (tmp_path / "answers.json").write_text(json.dumps(known))
    source = QuestionShards(str(shards), vocabulary=str(tmp_path / "answers.json"))
    asking = SimpleNamespace(mix={"pairs": source}, evals=(QuestionAccuracy(source),))
    if known[0] == "yes":
        check_labels(asking)
        return
    with pytest.raises(
        ValueError, match=r"none of the answers of 3 questions in .*, such as 'maybe'; write the set's own"
    ):
        check_labels(asking)


def test_equal_and_unknown_labels_are_good(tmp_path, monkeypatch):
    train, test = labelled(tmp_path / "a", "train", NAMES), labelled(tmp_path / "b", "test", NAMES)
    unknown = labelled(tmp_path / "c", "test", None)
    monkeypatch.delenv("NOWHERE", raising=False)
    far = replace(train, shards=("$NOWHERE/x", "s3://bucket/{00000..00001}.tar"))
    check_labels(stage(train, TopAccuracy(test), TopAccuracy(unknown), TopAccuracy(far)))
    check_labels(SimpleNamespace(mix={}, evals=()))
