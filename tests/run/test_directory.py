"""What a run reads has a name by its content: another content is another run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.weights import write_weights
from pretrain.config import Stage
from pretrain.data.labelled import QuestionShards
from pretrain.data.sources import ImageShards
from pretrain.models.visual_tokenizer.teachers import Clip, Encoder
from pretrain.run.directory import inputs_digest, other_inputs
from pretrain.tasks.tokenizer import TrainTokenizer
from tests.run.test_identity import RECIPE, TOKENIZER, VISION


def digest(stage: Stage, run_dir: Path) -> str:
    return inputs_digest({"images": "a1b2"}, other_inputs(RECIPE, stage, run_dir))


def store(path: Path, value: float) -> None:
    write_weights({"x": torch.tensor([value])}, path / "weights.safetensors", {})


def test_a_swapped_clip_is_another_input(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text("{}")
    (clip / "model.safetensors").write_bytes(b"one")
    stage = replace(TOKENIZER, task=TrainTokenizer(Clip("$DATA/clip")))
    before = digest(stage, tmp_path)
    assert before.startswith("images:a1b2 teacher:") and before != digest(TOKENIZER, tmp_path) == "images:a1b2"
    (clip / "README.md").write_text("what the model is for")
    clip.rename(tmp_path / "moved")
    moved = replace(stage, task=TrainTokenizer(Clip("$DATA/moved")))
    assert digest(moved, tmp_path) == before, "neither its place nor its description counts"
    for name, content in (("model.safetensors", b"two"), ("config.json", b"[]"), ("preprocessor_config.json", b"{}")):
        (tmp_path / "moved" / name).write_bytes(content)
        after = digest(moved, tmp_path)
        assert after != before, name
        before = after


@pytest.mark.parametrize(
    ("stage", "knob"),
    [
        (replace(TOKENIZER, task=TrainTokenizer(Encoder("start"))), "teacher"),
        (VISION, "visual_tokenizer"),
        (replace(TOKENIZER, init_from="start"), "init_from"),
    ],
)
@pytest.mark.parametrize("by_path", [False, True])
def test_other_weights_under_the_same_name_are_another_input(tmp_path, stage, knob, by_path):
    name = "tokenizer" if knob == "visual_tokenizer" else "start"
    if by_path:
        path = str(tmp_path / name)
        change = {"task": TrainTokenizer(Encoder(path))} if knob == "teacher" else {knob: path}
        stage = replace(stage, **change)
    way_out = (
        "does not exist; give the path of a weights.safetensors" if by_path else "run the stage .* to its end first"
    )
    with pytest.raises(ValueError, match=f"{knob}=.*{way_out}"):
        digest(stage, tmp_path / "run" if by_path else tmp_path)
    digests = []
    for value in (1.0, 1.0, 2.0):
        store(tmp_path / name, value)
        digests.append(digest(stage, tmp_path / "run" if by_path else tmp_path))
    assert digests[0] == digests[1] != digests[2] and f"{knob}:" in digests[0]


def test_a_file_that_a_source_reads_is_another_input_too(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", str(tmp_path))
    assert QuestionShards("x").files == ("$DATA/answers.json",)

    class Listed(ImageShards):
        files = ("$DATA/answers.json",)

    stage = replace(TOKENIZER, mix={"images": Listed("x")})
    with pytest.raises(ValueError, match=r"mix\.images reads .*answers\.json, which does not exist"):
        digest(stage, tmp_path)
    digests = []
    for content in ('["a"]', '["a"]', '["b"]'):
        (tmp_path / "answers.json").write_text(content)
        digests.append(digest(stage, tmp_path))
    assert digests[0] == digests[1] != digests[2] and digests[0].startswith("images:a1b2 images:")
