"""clip_benchmark's door: our type is among its types, and what its evaluations call gives our vectors. A stand-in takes
the package's place; its version 1.6.2 has these names."""

from __future__ import annotations

import io
import sys
import types

import pytest
import torch
from PIL import Image

import pretrain
from pretrain.clip_benchmark import load_for_benchmark, main
from tests.test_pretrained import TEXTS, fusion, pictures, stage, task  # noqa: F401, the fixtures
from tests.toys import refused


def test_it_gives_our_vectors(stage):  # noqa: F811
    model, transform, tokenizer = load_for_benchmark(
        model_name="x", pretrained=str(stage), cache_dir=None, device="cpu"
    )
    pixels = torch.stack([transform(Image.open(io.BytesIO(data))) for data in pictures(3)])
    ours = pretrain.load(stage)
    assert model.eval() is model and not list(model.parameters())
    torch.testing.assert_close(model.encode_image(pixels), ours.embed_images(pictures(3)), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode_text(tokenizer(TEXTS)), ours.embed_texts(TEXTS), rtol=0, atol=1e-6)
    assert tokenizer("a bus").shape[0] == 1


def test_its_command_line_knows_our_type(monkeypatch):
    models, cli, called = types.ModuleType("clip_benchmark.models"), types.ModuleType("clip_benchmark.cli"), []
    models.TYPE2FUNC, models.MODEL_TYPES = {"open_clip": None}, ["open_clip"]  # type: ignore[attr-defined]
    cli.main = lambda: called.append((sys.argv[1:], list(models.MODEL_TYPES)))  # type: ignore[attr-defined]
    for module in (types.ModuleType("clip_benchmark"), models, cli):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for _ in range(2):
        assert main(["eval", "--model_type", "imglish"]) == 0
    assert called == [(["eval", "--model_type", "imglish"], ["open_clip", "imglish"])] * 2
    assert models.TYPE2FUNC["imglish"] is load_for_benchmark


def test_what_cannot_be_used_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    assert "clip_benchmark cannot be imported" in refused(capsys, main, "eval")
    with pytest.raises(ValueError, match="does not exist"):
        load_for_benchmark("x", str(tmp_path / "no"))
