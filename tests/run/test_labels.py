"""Sets whose labels mean something else are refused before anything is trained or scored."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.data.labelled import LabelledShards
from pretrain.evals.labelled import TopAccuracy
from pretrain.evals.probe import Probe
from pretrain.run.labels import check_labels


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


def test_equal_and_unknown_labels_are_good(tmp_path, monkeypatch):
    train, test = labelled(tmp_path / "a", "train", NAMES), labelled(tmp_path / "b", "test", NAMES)
    unknown = labelled(tmp_path / "c", "test", None)
    monkeypatch.delenv("NOWHERE", raising=False)
    far = replace(train, shards=("$NOWHERE/x", "s3://bucket/{00000..00001}.tar"))
    check_labels(stage(train, TopAccuracy(test), TopAccuracy(unknown), TopAccuracy(far)))
    check_labels(SimpleNamespace(mix={}, evals=()))
