"""Directories that cannot become towers: one sentence each."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file, save_file

from pretrain import export
from tests.models.towers.others import whole_model, write_directory, write_tokenizer
from tests.toys import refused


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_directory(tmp_path_factory.mktemp("clip") / "clip", whole_model("clip"), "clip")


def copy(clip, to, without=(), **config):
    to.mkdir()
    for path in clip.iterdir():
        if path.name not in without:
            (to / path.name).write_bytes(path.read_bytes())
    if config:
        told = json.loads((to / "config.json").read_text()) | config
        (to / "config.json").write_text(json.dumps(told))
    return to


@pytest.mark.parametrize(
    ("without", "config", "said"),
    [
        (("config.json",), {}, "holds no config.json"),
        (("model.safetensors",), {}, "pickled weights are not read"),
        (("tokenizer.json",), {}, "does not exist; give a tokenizer.json"),
        ((), {"model_type": "gpt2"}, "holds a gpt2, not clip, siglip, align, vilt, blip or what"),
    ],
)
def test_directories_of_the_wrong_kind(clip, without, config, said, tmp_path, capsys):
    place = copy(clip, tmp_path / "x", without, **config)
    assert said in refused(capsys, export.main, "from-hf", place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_weights_are_named(clip, tmp_path, capsys):
    place = copy(clip, tmp_path / "x")
    state = load_file(place / "model.safetensors")
    state.pop("text_model.encoder.layers.1.mlp.fc1.bias")
    save_file(state, place / "model.safetensors", {"format": "pt"})
    said = refused(capsys, export.main, "from-hf", place, tmp_path / "out")
    assert "1 are missing and 0 have another shape (first text_model.encoder.layers.1.mlp.fc1.bias)" in said


def test_a_tokenizer_of_more_words_than_the_weights(clip, tmp_path, capsys):
    place = copy(clip, tmp_path / "x")
    told = json.loads(write_tokenizer(place / "tokenizer.json", "clip").read_text())
    told["model"]["vocab"]["more"] = 30
    (place / "tokenizer.json").write_text(json.dumps(told))
    said = refused(capsys, export.main, "from-hf", place, tmp_path / "out")
    assert "has ids up to 30, and its weights have 22 words; give the tokenizer" in said


def test_two_text_encoders_are_no_pair(clip, tmp_path, capsys):
    said = refused(capsys, export.main, "from-hf", clip, tmp_path / "out", "--text", clip)
    assert "holds a clip; give one of clip_vision_model" in said
