"""A Hugging Face directory: it loads by AutoModel without this package, computes the same, and says what it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import pretrain
from pretrain import embed
from pretrain.batch import PAD, Layout, make_batch
from pretrain.checkpoint.weights import write_weights
from pretrain.config import to_json
from pretrain.export import main
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.parallel.state import named_state
from pretrain.portions import weights_name
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import CONFIGS, PAPER, PATCHES, pictures
from tests.toys import encoded, needs, picture, refused, write_text_model

TEXTS = ["a red bus", "two small dogs", "a bus"]
MODELS = CONFIGS | {"vilt": replace(PAPER, fusion_layers=0, ffn="shared", text_norm=True)}


def written(tmp_path: Path, name: str, experts=("vision", "language", "fusion"), look: str = "squash") -> tuple:
    """(our directory, theirs) of a model with every number away from 0 and 1."""
    cfg = replace(MODELS[name.removesuffix(", pruned")], vocab_size=60, final_norm=name != "paper")
    if name.endswith(", pruned"):
        cfg = replace(cfg, heads=cfg.heads - 1, head_dim=cfg.head_width)
    torch.manual_seed(4)
    contrast = Contrastive(project=False) if name == "vilt" else Contrastive(5, projection_bias=name == "vlmo")
    objectives = [contrast, MaskedData(image_codes=7)] if len(experts) > 1 else []
    task = PretrainTask(cfg, experts, objectives)
    with torch.no_grad():
        for value in task.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    config = {"model": to_json(cfg), "look": {"evaluation": look}, "recipe": "toy", "stage": "fusion"}
    write_weights(dict(named_state(task)), tmp_path / "ours" / "weights.safetensors", config)
    if "language" in experts:
        write_text_model(tmp_path / "ours" / "text.model", TEXTS * 9, 40)
    assert main(["to-hf", str(tmp_path / "ours"), str(tmp_path / "hf")]) == 0
    return task.eval(), tmp_path / "hf"


def loaded(directory: Path, monkeypatch: pytest.MonkeyPatch):
    needs("transformers")
    from transformers import AutoModel, AutoProcessor, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(directory.parent / "modules"))

    model = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(directory, trust_remote_code=True)


@pytest.mark.parametrize("name", [*MODELS, "vlmo, pruned", "released, pruned"])
@torch.no_grad()
def test_it_computes_the_same(tmp_path, name, monkeypatch):
    task, directory = written(tmp_path, name)
    model, processor = loaded(directory, monkeypatch)
    pixels, words = pictures(3), processor.texts(TEXTS)
    ids, images = words["input_ids"], pixels.float() / 127.5 - 1
    seen = ids != PAD
    assert not seen.all()  # some of it is padding

    pairs = make_batch(Layout(pairs=3, patches=PATCHES, pair_len=ids.shape[1]), images=pixels, pair_tokens=ids)
    ours, theirs = task.encoder(pairs), model(images, **words)
    same(theirs.image_rows, ours.pair_images)
    same(theirs.text_rows[seen], ours.pair_texts[seen])
    same(model.word_logits(theirs.text_rows)[seen], task.objectives["masked"].text.logits(ours.pair_texts)[seen])
    layout = Layout(images=3, texts=3, patches=PATCHES, text_len=ids.shape[1], dual=3)
    apart = task.encoder(make_batch(layout, images=pixels, text_tokens=ids))
    head = task.objectives["contrastive"]
    same(model.get_image_features(images), head.embed_images(apart))
    same(model.get_text_features(**words), head.embed_texts(apart))


def same(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6 * max(ours.abs().max().item(), 1))


@torch.no_grad()
def test_its_processor_sees_what_ours_sees(tmp_path, monkeypatch):
    _, directory = written(tmp_path, "released")
    model, processor = loaded(directory, monkeypatch)
    ours = pretrain.load(tmp_path / "ours")
    data = [encoded(picture(n, width=60 + n, height=45), "PNG") for n in range(3)]
    looks = []
    for number, each in enumerate(data):
        (tmp_path / f"{number}.png").write_bytes(each)
        looks.append(Image.open(tmp_path / f"{number}.png"))
    inputs = processor(images=looks, text=TEXTS)
    pixels = torch.stack([ours.look(each) for each in data])
    assert (inputs["pixel_values"] == pixels.float().div(127.5).sub(1)).all()
    images, texts = ours.embed_images(data), ours.embed_texts(TEXTS)
    torch.testing.assert_close(model.get_image_features(inputs["pixel_values"]), images, rtol=0, atol=1e-6)
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model.get_text_features(**words), texts, rtol=0, atol=1e-6)
    assert processor.decode(words["input_ids"][0].tolist()) == ours.tokenizer().decode(words["input_ids"][0].tolist())


def test_it_needs_nothing_of_this_package(tmp_path):
    needs("transformers")
    _, directory = written(tmp_path, "vlmo", experts=("vision",))
    code = (
        "import sys, torch; from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({str(directory)!r}, trust_remote_code=True)\n"
        "rows = model(torch.zeros(2, 3, 32, 32)).image_rows\n"
        "assert rows.shape == (2, 17, 32) and not [m for m in sys.modules if m.split('.')[0] == 'pretrain']\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_it_comes_back(tmp_path):
    _, directory = written(tmp_path, "released, pruned", look="squash")
    assert main(["from-hf", str(directory), str(tmp_path / "back")]) == 0
    for place in (directory, tmp_path / "back"):  # it loads as it is, too
        ours, back = pretrain.load(tmp_path / "ours"), pretrain.load(place)
        assert replace(back.model, init=ours.model.init) == ours.model and back.transform == ours.transform
        torch.testing.assert_close(back.embed_texts(TEXTS), ours.embed_texts(TEXTS), rtol=0, atol=0)
        assert back.fill_mask(["a <mask>"]) == ours.fill_mask(["a <mask>"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(encoded(picture(1), "PNG"))
    assert embed.main([str(directory), str(tmp_path / "a"), "--out", str(tmp_path / "v")]) == 0
    assert weights_name(directory) != weights_name(tmp_path / "back")


def test_the_card_says_what_it_is(tmp_path):
    ours = tmp_path / "ours"
    ours.mkdir()
    stage = {"steps": 30, "batch": {"class": "BatchSize", "pairs": 8}, "mix": {"pairs": {"shards": "$DATA/pairs"}}}
    (ours / "recipe.json").write_text(json.dumps({"stages": {"fusion": stage | {"init_from": "language"}}}))
    (ours / "eval.json").write_text(json.dumps({"masked/pair_text/accuracy": 71.234, "step": 30, "weights": "x"}))
    lines = [json.dumps({"step": n, "loss": 9 - n / 10}) for n in range(1, 31)]
    (ours / "metrics.jsonl").write_text("\n".join([*lines, "half a li"]))
    written(tmp_path, "paper", look="crop")
    card = (tmp_path / "hf" / "README.md").read_text()
    for words in (
        "# toy: fusion", "30 steps, batch pairs 8", "- pairs: `$DATA/pairs`", "begins at `language`", "averages pixels",
        "loss at step 1: 8.9, ", "30: 6", "| masked/pair_text/accuracy | 71.23 |",
    ):  # fmt: skip
        assert words in card, card


def test_what_cannot_be_written_is_one_sentence(tmp_path, capsys):
    written(tmp_path, "released")
    assert "is not empty; give a new directory" in refused(capsys, main, "to-hf", tmp_path / "ours", tmp_path / "hf")
    assert "no does not exist" in refused(capsys, main, "to-hf", tmp_path / "no", tmp_path / "new")
    line = ["to-hf", tmp_path / "ours", tmp_path / "new", "--text-tokenizer", tmp_path / "hf" / "config.json"]
    assert "is not a SentencePiece model" in refused(capsys, main, *line)
    assert "or what export to-hf wrote" in refused(capsys, main, "from-hf", tmp_path / "ours", tmp_path / "new")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for change, words in (({"model_type": "bert"}, "holds a bert"), ({"dim": 7}, "its config is no MultiwayConfig")):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
        assert words in refused(capsys, main, "from-hf", tmp_path / "hf", tmp_path / "new")
    assert not (tmp_path / "new").exists()
