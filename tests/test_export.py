"""Weights in and out: released naming both ways, files that are refused, resized positions, the command."""

from __future__ import annotations

import argparse
import os
import pickle
from dataclasses import replace

import pytest
import torch

from benchmarks.compare.others import torchscale_model
from pretrain.batch import Layout
from pretrain.checkpoint.weights import load_handover, write_weights
from pretrain.config import to_json
from pretrain.export import main
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.released_weights import (
    from_released,
    read_model,
    read_tensors,
    resize_positions,
    to_released,
    write_tensors,
)
from tests.toy_models import CODES, RELEASED, VQ, encoder, encoder_of, random_batch

CONFIG = RELEASED


def weights(cfg: MultiwayConfig = CONFIG, experts=("vision", "language")) -> dict[str, torch.Tensor]:
    """A task's tensors: the encoder, both masked heads and the contrastive head."""
    state = {f"encoder.{key}": value for key, value in encoder(cfg, experts).state_dict().items()}
    for name, size in (("text", cfg.vocab_size), ("image", CODES)):
        state[f"objectives.masked.{name}.weight"] = torch.randn(size, cfg.dim)
        state[f"objectives.masked.{name}.bias"] = torch.randn(size)
    for name in ("vision", "language"):
        state[f"objectives.contrastive.{name}.weight"] = torch.randn(cfg.dim, cfg.dim)
    return state | {"objectives.contrastive.logit_scale": torch.tensor([2.6])}


def encode(state: dict[str, torch.Tensor], cfg: MultiwayConfig) -> torch.Tensor:
    return encoder_of(state, cfg).rows(random_batch(Layout(pairs=2, patches=cfg.patches, pair_len=6), cfg=cfg))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_round_trip_changes_nothing(tmp_path, name):
    state = weights()
    write_tensors(tmp_path / name, to_released(state, CONFIG))
    back, cfg = from_released(read_tensors(tmp_path / name), heads=4)
    assert cfg == CONFIG
    assert same(back, state)
    assert sorted(os.listdir(tmp_path)) == [name]


def test_torchscale_loads_our_export_strictly():
    """That it then computes the same is tested in models/multiway/test_reference_beit3.py."""
    released = to_released(weights(), CONFIG)
    torchscale_model(CONFIG, released)
    assert {key for key in released if not key.startswith("beit3.")} == {
        *("mlm_head.weight", "mlm_head.bias", "mim_head.weight", "mim_head.bias"),
        *("language_head.weight", "vision_head.weight", "logit_scale"),
    }
    assert released["logit_scale"].shape == ()


def test_torchscales_weights_become_ours():
    torch.manual_seed(5)
    reference = torchscale_model(CONFIG)
    released = {f"beit3.{key}": value for key, value in reference.state_dict().items()}
    state, cfg = from_released(released, heads=4)
    assert cfg == CONFIG
    batch = random_batch(Layout(texts=2, text_len=6), padded=False)
    expected = reference(textual_tokens=batch.text_inputs)["encoder_out"]
    torch.testing.assert_close(encoder_of(state, cfg)(batch).texts, expected, atol=1e-5, rtol=1e-5)


def test_a_shared_attention_is_written_twice():
    shared = replace(CONFIG, attention="shared")
    state = weights(shared)
    back, cfg = from_released(to_released(state, shared), heads=4)
    torch.testing.assert_close(encode(back, cfg), encode(state, shared), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attention": "shared", "fusion_layers": 1}, "fusion experts"),
        ({"sub_norm": False}, "sub_norm=False"),
        ({"layer_scale": 0.1}, "layer_scale=0.1"),
        ({"relative_position": True}, "relative_position=True"),
        ({"text_norm": True}, "text_norm=True"),
        ({"key_bias": False}, "key_bias=False"),
    ],
)
def test_what_the_release_cannot_express_is_refused(change, says):
    cfg = replace(CONFIG, **change)
    with pytest.raises(ValueError, match=says):
        to_released(weights(cfg, ("vision", "language", "fusion")), cfg)


def test_rows_that_are_compared_as_they_are_get_projections_that_change_nothing():
    state = {name: value for name, value in weights().items() if ".contrastive." not in name or "scale" in name}
    released = to_released(state, CONFIG)
    assert released["vision_head.weight"].equal(torch.eye(CONFIG.dim)) and "language_head.weight" in released


def test_projections_with_a_bias_are_refused():
    bias = {f"objectives.contrastive.{name}.bias": torch.ones(CONFIG.dim) for name in ("vision", "language")}
    with pytest.raises(ValueError, match=r"have no bias \(contrastive.projection_bias\).*to-hf and to-onnx can"):
        to_released(weights() | bias, CONFIG)


def test_a_stage_without_language_is_refused():
    with pytest.raises(ValueError, match="needs a model with vision and language"):
        to_released(weights(experts=("vision",)), CONFIG)


def test_incomplete_released_weights_are_refused_by_name():
    released = to_released(weights(), CONFIG)
    for key, says in (
        ("beit3.text_embed.weight", "text_embed"),
        ("beit3.encoder.layer_norm.A.weight", "layer_norm.A.weight"),
        ("beit3.encoder.layers.1.ffn.B.fc1.bias", "layers.1.ffn.B.fc1.bias"),
        ("beit3.encoder.layers.0.ffn.A.fc1.weight", "no layers"),
    ):
        with pytest.raises(ValueError, match=says):
            from_released({k: v for k, v in released.items() if k != key})


def test_half_a_fine_tuning_head_is_left_out():
    released = to_released(weights(), CONFIG) | {"head.weight": torch.zeros(3, CONFIG.dim)}
    assert same(from_released(released, heads=4)[0], weights())


def test_resized_positions_keep_the_class_row_and_the_shape_of_a_slope():
    state = weights()
    key = "encoder.vision_embed.positions"
    slope = torch.arange(4.0).repeat(4, 1).reshape(16, 1).expand(16, CONFIG.dim)  # grows to the right
    state[key] = torch.cat([torch.full((1, CONFIG.dim), 9.0), slope])
    resized, cfg = resize_positions(state, CONFIG, 64)
    assert cfg.grid == 8 and resized[key].shape == (65, CONFIG.dim)
    assert (resized[key][0] == 9).all()
    grid = resized[key][1:, 0].view(8, 8)
    assert (grid.diff(dim=1) > 0).all() and torch.allclose(grid, grid[:1].expand(8, 8), atol=1e-5)
    assert encode(resized, cfg).isfinite().all()
    assert same(resize_positions(state, CONFIG, 32)[0], state)
    with pytest.raises(ValueError, match="image_size=33"):
        resize_positions(state, CONFIG, 33)


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload_ran",)


def test_a_pickle_from_outside_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.zeros(1)}, "x": Payload()}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth.*more than tensors"):
        read_tensors(tmp_path / "bad.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ValueError, match=r"raw\.pth"):
        read_tensors(tmp_path / "raw.pth")
    assert not (tmp_path / "payload_ran").exists()


def test_a_fine_tuning_checkpoint_with_its_command_line_is_read(tmp_path):
    torch.save(
        {"model": to_released(weights(), CONFIG), "epoch": 3, "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth"
    )
    assert len(read_tensors(tmp_path / "a.pth")) == len(weights())


@pytest.mark.parametrize("name", ["cut.pth", "cut.safetensors"])
def test_a_cut_file_is_refused(tmp_path, name):
    write_tensors(tmp_path / name, weights())
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=name):
        read_tensors(tmp_path / name)
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=name):
        read_tensors(tmp_path / name)


def test_the_command_converts_both_ways(tmp_path):
    write_tensors(tmp_path / "theirs.pth", to_released(weights(), CONFIG))
    main(["from-released", str(tmp_path / "theirs.pth"), str(tmp_path / "ours"), "--heads", "4"])
    state, cfg, config = read_model(tmp_path / "ours")
    assert cfg == CONFIG and same(state, weights()) and config["model"]["dim"] == CONFIG.dim
    main(["resize", str(tmp_path / "ours"), str(tmp_path / "larger"), "--image-size", "48"])
    assert read_model(tmp_path / "larger")[1].image_size == 48
    main(["to-released", str(tmp_path / "ours"), str(tmp_path / "again.safetensors")])
    assert same(read_tensors(tmp_path / "again.safetensors"), read_tensors(tmp_path / "theirs.pth"))


def test_a_stages_own_config_is_read(tmp_path):
    config = {"recipe": "tiny", "stage": "fusion", "model": to_json(CONFIG)}
    write_weights(weights(), tmp_path / "fusion" / "weights.safetensors", config)
    main(["resize", str(tmp_path / "fusion"), str(tmp_path / "larger"), "--image-size", "48"])
    _, cfg, back = read_model(tmp_path / "larger")
    assert cfg == replace(CONFIG, image_size=48) and back["stage"] == "fusion"


def test_released_weights_start_a_stage(tmp_path):
    """A stage's `init_from` reads what from-released wrote."""
    write_tensors(tmp_path / "theirs.pth", to_released(weights(), CONFIG))
    main(["from-released", str(tmp_path / "theirs.pth"), str(tmp_path / "ours"), "--heads", "4"])
    stage = torch.nn.Module()
    stage.encoder = MultiwayEncoder(CONFIG, ("vision", "language"))
    handover = load_handover(stage, tmp_path / "ours")
    assert handover.missing == []
    assert all(name.startswith("objectives.") for name in handover.unexpected)
    assert torch.equal(stage.encoder.text_embed.tokens.weight, weights()["encoder.text_embed.tokens.weight"])


@pytest.mark.parametrize("case", ["missing", "a tokenizer", "broken json", "wrong size", "no directory", "full disk"])
def test_the_command_ends_with_a_sentence_and_2(tmp_path, capsys, monkeypatch, case):
    config = {"model": to_json(VQ if case == "a tokenizer" else CONFIG)}
    write_weights(weights(), tmp_path / "ours" / "weights.safetensors", config)
    argv = ["to-released", str(tmp_path / "ours"), str(tmp_path / "out.pth")]
    if case == "missing":
        argv[1] = str(tmp_path / "nowhere")
    elif case == "broken json":
        write_tensors(tmp_path / "ours" / "weights.safetensors", weights())  # without a header
        (tmp_path / "ours" / "config.json").write_text("{")
    elif case == "wrong size":
        argv = ["resize", str(tmp_path / "ours"), str(tmp_path / "out"), "--image-size", "33"]
    elif case == "no directory":
        argv[2] = str(tmp_path / "nowhere" / "out.pth")
    elif case == "full disk":

        def full(_, path):
            path.write_bytes(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

        monkeypatch.setattr(torch, "save", full)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
