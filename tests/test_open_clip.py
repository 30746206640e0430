"""Towers of CLIP's architecture as open_clip has them: its own functions load the directory and give our vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import tests.vision_operators  # noqa: F401
from pretrain import export
from pretrain.batch import EOS, Layout, make_batch
from pretrain.checkpoint.weights import read_weights, write_weights
from pretrain.config import to_json
from pretrain.data.json_tokenizer import JsonTokenizer
from pretrain.models.towers.dual import DualTowers
from pretrain.models.towers.tower import Tower
from pretrain.stored_model import FURTHER, build_stored, read_stored
from tests.models.towers.others import LENGTH, whole_model, write_directory
from tests.test_export import CONFIG as MULTIWAY
from tests.test_export import weights as multiway
from tests.toys import picture, refused, write_text_model

TEXTS = ["word3 word1", "word7", "word19 word0 word2 word4 word5 word6 word8 word9"]


def exported(tmp_path: Path, **changes) -> tuple[Path, Path]:
    """(ours, open_clip's) of a small CLIP."""
    theirs, ours, out = (tmp_path / name for name in ("clip", "ours", "open_clip"))
    model = whole_model("clip")
    for name, value in changes.items():
        for config in (model.config.vision_config, model.config.text_config):
            setattr(config, name, value)
    write_directory(theirs, model, "clip")
    assert export.main(["from-hf", str(theirs), str(ours)]) == 0
    assert export.main(["to-open-clip", str(ours), str(out)]) == 0
    return ours, out


def test_its_files_have_open_clips_names_and_the_tokenizers_own_ids(tmp_path):
    """Without the package: what stands in them, by the original's tensors."""
    ours, out = exported(tmp_path)
    state, theirs = load_file(out / "open_clip_model.safetensors"), load_file(tmp_path / "clip" / "model.safetensors")
    assert state["token_embedding.weight"].equal(theirs["text_model.embeddings.token_embedding.weight"])
    assert state["visual.proj"].equal(theirs["visual_projection.weight"].T) and state["logit_scale"].shape == ()
    for side, prefix in (("vision", "visual."), ("text", "")):
        own = [theirs[f"{side}_model.encoder.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
        assert state[f"{prefix}transformer.resblocks.1.attn.in_proj_weight"].equal(torch.cat(own))
    config = json.loads((out / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["pool_type"] == "argmax" and config["model_cfg"]["quick_gelu"]
    assert sorted(path.name for path in out.iterdir()) == [
        *("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]
    from tokenizers import Tokenizer

    ids, tokenizer = (
        Tokenizer.from_file(str(out / "tokenizer.json")).encode(TEXTS[0]).ids,
        JsonTokenizer(ours / "text.json"),
    )
    assert ids == [tokenizer.own_ids[index] for index in tokenizer.encode(TEXTS[0])]


def vectors(ours: Path, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    state, model, _ = read_stored(ours, FURTHER)
    task = build_stored(state, model, ours).eval()
    layout = Layout(images=len(pixels), texts=len(ids), patches=16, text_len=ids.shape[1], dual=len(ids))
    encoded = task.encoder(make_batch(layout, images=pixels, text_tokens=ids))
    head = task.objectives["contrastive"]
    return head.embed_images(encoded), head.embed_texts(encoded)


@pytest.mark.parametrize(("act", "eps"), [("quick_gelu", 1e-5), ("gelu", 1e-3)])
@torch.no_grad()
def test_open_clip_gives_our_vectors(tmp_path, act, eps):
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed; see the extra open-clip")

    ours, out = exported(tmp_path, hidden_act=act, layer_norm_eps=eps)
    model, _, look = open_clip.create_model_and_transforms(f"local-dir:{out}")
    theirs = open_clip.get_tokenizer(f"local-dir:{out}")(TEXTS)
    own = JsonTokenizer(ours / "text.json")
    rows = [own.encode(text, LENGTH) for text in TEXTS]
    ids = torch.tensor([row + [1] * (LENGTH - len(row)) for row in rows])
    pixels = torch.stack([torch.from_numpy(picture(n, 32, 32).copy()).permute(2, 0, 1) for n in range(3)])
    images, texts = vectors(ours, pixels, ids)
    seen = torch.stack([look(Image.fromarray(picture(n, 32, 32))) for n in range(3)])
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(model.eval().encode_image(seen, normalize=True), images, **close)
    torch.testing.assert_close(model.encode_text(theirs, normalize=True), texts, **close)


def towers(path: Path, vision: Tower, text: Tower, **more) -> Path:
    model = DualTowers(vision, text, 32, 8, 40, LENGTH)
    head = {"objectives.contrastive.logit_scale": torch.ones(1), **more}
    write_weights({"encoder.x": torch.zeros(1), **head}, path / "weights.safetensors", {"model": to_json(model)})
    return path


SEES, READS = Tower("clip_vision_model"), Tower("clip_text_model", pooling="eos")


@pytest.mark.parametrize(
    ("vision", "text", "said"),
    [
        (Tower("vit"), READS, "has a vit and a clip_text_model; of towers, open_clip computes the same only"),
        (Tower("siglip_vision_model", pooling="attention"), Tower("siglip_text_model", pooling="last"), "another GELU"),
        (replace(SEES, pooling="attention"), READS, "model.vision.pooling=attention, which open_clip's CLIP cannot"),
        (SEES, replace(READS, pooling="class"), "model.text.pooling=class"),
        (SEES, replace(READS, projection=8), "projections of 0 and 8 in the towers"),
        (SEES, replace(READS, settings={"hidden_act": "gelu"}), "hidden_act of gelu and quick_gelu"),
    ],
)
def test_what_open_clip_cannot_express_is_one_sentence(tmp_path, capsys, vision, text, said):
    place = towers(tmp_path / "x", vision, text)
    assert said in refused(capsys, export.main, "to-open-clip", place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_multiway_encoder_is_refused_and_a_full_directory_too(tmp_path, capsys):
    write_weights(multiway(), tmp_path / "m" / "weights.safetensors", {"model": to_json(MULTIWAY)})
    assert "open_clip loads two separate towers only; use to-hf" in refused(
        capsys, export.main, "to-open-clip", tmp_path / "m", tmp_path / "out"
    )
    ours, out = exported(tmp_path)
    assert "is not empty; give a new directory" in refused(capsys, export.main, "to-open-clip", ours, out)


def test_a_sentencepiece_model_stays_with_our_ids(tmp_path):
    ours, _ = exported(tmp_path)
    (ours / "text.json").unlink()
    write_text_model(ours / "text.model", ["a red bus", "two dogs"] * 9, 24)
    assert export.main(["to-open-clip", str(ours), str(tmp_path / "out")]) == 0
    state = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    wanted = read_weights(ours)[0]["encoder.text.model.embeddings.token_embedding.weight"]
    assert state["token_embedding.weight"].equal(wanted) and (tmp_path / "out" / "text.model").is_file()
    text = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert (text["pool_type"], text["eos_id"]) == ("eos", EOS) and "hf_tokenizer_name" not in text
