"""Sources of fine-tuning tasks, and the list of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.answers import main
from pretrain.data.labelled import (
    LabelledPairShards,
    LabelledShards,
    QuestionShards,
    ReferenceShards,
    TwoPictureShards,
    read_vocabulary,
)
from pretrain.data.shards.reader import MOST_CAPTIONS, BadSample
from pretrain.data.sources import CaptionShards
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.data.transforms import ImageTransform, sample_rng
from tests.toys import pair_sample, refused, write_source, write_text_model

LOOK = ImageTransform(size=16, train=False)


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    return TextTokenizer(write_text_model(tmp_path / "text.model", ["a red bus", "two dogs"] * 9, 40))


def members(facts: Any, **more: bytes) -> dict[str, bytes]:
    sample = pair_sample("x", 1, "a red bus")
    return {"jpg": sample["jpg"], "txt": sample["txt"], "json": json.dumps(facts).encode(), **more}


def decoded(source: Any, sample: dict, tokenizer: Any = None) -> dict[str, Any]:
    assert set(sample) - {"jpe"} <= set(source.wanted) | {"txt"}
    return dict(source.decode(sample, LOOK, tokenizer, sample_rng(0, 0, 0)).extra)


def test_labels_are_numbers_of_classes():
    assert decoded(LabelledShards("x", classes=3), members({"label": 2})) == {"label": 2}
    for wrong in ({"label": 3}, {"label": -1}, {"label": "2"}, {"label": True}, {}):
        with pytest.raises(BadSample, match="is no number from 0 to 2"):
            decoded(LabelledShards("x", classes=3), members(wrong))
    with pytest.raises(BadSample, match="its json is no object"):
        decoded(LabelledShards("x"), members([1]))


def test_answers_become_scores(tmp_path, tokenizer):
    (tmp_path / "answers.json").write_text(json.dumps(["red", "blue", "dog"]))
    source = QuestionShards("x", vocabulary=str(tmp_path / "answers.json"))
    given = ["Red"] * 2 + ["a dog"] * 7 + ["unheard of"]
    extra = decoded(source, members({"answers": given}), tokenizer)
    np.testing.assert_allclose(extra["scores"], [0.6, 0.0, 1.0])
    assert extra["answers"] == tuple(given)
    for wrong in ({}, {"answers": []}, {"answers": [1]}):
        with pytest.raises(BadSample, match='no list of "answers"'):
            decoded(source, members(wrong), tokenizer)


def test_the_second_picture_is_looked_at_too(tokenizer):
    sample = members({"label": 1}, jpe=pair_sample("y", 2)["jpg"])
    extra = decoded(TwoPictureShards("x"), sample, tokenizer)
    assert (
        extra["label"] == 1 and extra["second"].tolist() == LOOK(sample["jpe"]).tolist() != LOOK(sample["jpg"]).tolist()
    )
    with pytest.raises(BadSample, match="no second picture"):
        decoded(TwoPictureShards("x"), members({"label": 1}), tokenizer)


def test_a_sentence_has_one_class(tokenizer):
    sample = members({"label": 2, "label_name": "contradiction"})
    assert decoded(LabelledPairShards("x"), sample, tokenizer) == {"label": 2, "label_name": "contradiction"}
    assert decoded(LabelledPairShards("x"), members({"label": 0}), tokenizer) == {"label": 0, "label_name": ""}
    with pytest.raises(BadSample, match="is no number from 0 to 2"):
        decoded(LabelledPairShards("x"), members({"label": 3}), tokenizer)


def test_each_epoch_may_draw_another_caption(tokenizer):
    sample, source = (
        members({"captions": ["a red bus", "two dogs", "a bus"]}),
        CaptionShards("x", text_len=8, draw=True),
    )
    drawn = [source.decode(sample, LOOK, tokenizer, sample_rng(0, epoch, 5)).ids.tolist() for epoch in range(20)]
    assert len({tuple(ids) for ids in drawn}) == 3
    assert drawn[3] == source.decode(sample, LOOK, tokenizer, sample_rng(0, 3, 5)).ids.tolist()


def test_a_hostile_number_of_captions_is_a_bad_sample(tokenizer):
    """16 MiB of JSON hold four million, whose ids take 2 GB."""
    most, more = ({"captions": ["a bus"] * number} for number in (MOST_CAPTIONS, MOST_CAPTIONS + 1))
    assert len(decoded(CaptionShards("x", text_len=4), members(most), tokenizer)["captions"]) == MOST_CAPTIONS
    for source in (CaptionShards("x", text_len=4), ReferenceShards("x", text_len=4)):
        with pytest.raises(BadSample, match="it has 1001 captions; at most 1000 are read"):
            decoded(source, members(more), tokenizer)


def test_the_list_of_answers(tmp_path, capsys):
    def sample(number: int, given: str, **more: str) -> dict:
        facts = {"answers": [given] * 9 + ["x"], **more}
        return pair_sample(str(number), number) | {"json": json.dumps(facts).encode()}

    samples = [sample(0, "Red"), sample(1, "red."), sample(2, "blue"), sample(3, "blue", answer="the dog")]
    samples += [sample(4, "two"), pair_sample("5", 5)]
    shards, out = write_source(tmp_path / "shards", [samples]), tmp_path / "answers.json"
    assert main([str(shards), "--least", "1", "--out", str(out)]) == 0
    assert json.loads(out.read_text()) == ["red", "2", "blue", "dog"]
    assert "4 answers, which 100.0 % of 5 questions have" in capsys.readouterr().out
    assert main([str(shards), "--least", "2", "--out", str(out)]) == 0 and json.loads(out.read_text()) == ["red"]
    assert "no answer of the 5 questions" in refused(capsys, main, shards, "--least", "3", "--out", out)
    assert "--least 0 is below 1" in refused(capsys, main, shards, "--least", "0", "--out", out)


def test_unilms_list_of_answers_is_read_too(tmp_path):
    lines = [{"answer": "b", "label": 1}, {"answer": "a", "label": 0}]
    (tmp_path / "answer2label.txt").write_text("\n".join(map(json.dumps, lines)))
    assert read_vocabulary(str(tmp_path / "answer2label.txt")) == {"a": 0, "b": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "is no list of answers"),
        ("[]", "is no list"),
        ('["a", "a"]', "twice"),
        ("x", "is no"),
        (None, "not exist"),
    ],
)
def test_a_wrong_list_is_one_sentence(tmp_path, content, words):
    if content is not None:
        (tmp_path / "answers.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        read_vocabulary(str(tmp_path / "answers.json"))
