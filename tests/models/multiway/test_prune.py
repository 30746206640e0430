"""Pruned weights: fewer heads are a model whose other heads say nothing, and zeros stand where numbers were small."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import pretrain
from pretrain.batch import Layout
from pretrain.checkpoint.weights import write_weights
from pretrain.config import to_json
from pretrain.export import main
from pretrain.flops import flops_per_sequence
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.prune import MATRIX, keep_heads, zero_smallest
from pretrain.objectives.contrastive import Contrastive
from pretrain.released_weights import to_released
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import CONFIGS, EXPERTS, PATCHES, encoder, random_batch
from tests.toys import picture, refused, write_text_model

LAYOUT = Layout(3, 2, 4, PATCHES, 7, 9)


def toy(name):
    cfg = CONFIGS[name]
    experts = EXPERTS if cfg.fusion_layers else ("vision", "language")
    model = encoder(cfg, experts)
    return cfg, experts, model, {f"encoder.{key}": value for key, value in model.state_dict().items()}


def silent(model, cfg, kept: int):
    """Head `kept` to the last of each block say nothing, which makes them the smallest."""
    with torch.no_grad():
        for block in model.blocks:
            for out in block.attention.out.values():
                out.weight[:, kept * cfg.head_width :] = 0


@pytest.mark.parametrize("name", ["paper", "vlmo"])
def test_fewer_heads_are_heads_that_say_nothing(name):
    cfg, experts, model, state = toy(name)
    silent(model, cfg, 3)
    pruned, smaller = keep_heads(state, cfg, 3)
    assert (smaller.heads, smaller.head_width, smaller.attention_dim) == (3, cfg.head_width, 3 * cfg.head_width)
    other = MultiwayEncoder(smaller, experts)
    other.load_state_dict({key.removeprefix("encoder."): value for key, value in pruned.items()})
    batch = random_batch(LAYOUT, cfg=cfg)
    torch.testing.assert_close(other.eval().rows(batch), model.eval().rows(batch), atol=1e-5, rtol=0)
    whole = flops_per_sequence(9, dim=cfg.dim, depth=cfg.depth, ffn_dim=cfg.ffn_dim)
    assert smaller.flops(Layout(texts=1, text_len=9)) < whole == cfg.flops(Layout(texts=1, text_len=9))


def test_heads_that_attend_together_go_together():
    cfg, experts, model, state = toy("released")
    with torch.no_grad():  # the first is small in one modality alone, the last in both
        for block in model.blocks:
            block.attention.out["vision"].weight[:, : cfg.head_width] = 0
            for out in block.attention.out.values():
                out.weight[:, -cfg.head_width :] *= 0.01
    pruned, smaller = keep_heads(state, cfg, 3)
    for name, value in pruned.items():
        if ".attention.v." in name and name.endswith("weight"):
            assert value.equal(state[name][: 3 * cfg.head_width]), name
    other = MultiwayEncoder(smaller, experts)
    other.load_state_dict({key.removeprefix("encoder."): value for key, value in pruned.items()})
    assert other.eval().rows(random_batch(LAYOUT, cfg=cfg)).isfinite().all()
    with pytest.raises(ValueError, match=r"model\.heads=3 of width 8 cannot be written as BEiT-3, .*; to-hf and"):
        to_released(pruned, smaller)


def test_the_smallest_become_zero():
    *_, state = toy("paper")
    pruned = zero_smallest(state, 0.25)
    for name, value in pruned.items():
        if not (MATRIX.fullmatch(name) and value.ndim == 2):
            assert value.equal(state[name])
            continue
        gone = value == 0
        assert gone.double().mean().item() == pytest.approx(0.25, abs=0.01)
        assert state[name].abs()[gone].max() < state[name].abs()[~gone].min() and value[~gone].equal(state[name][~gone])


def test_the_command_writes_a_model_that_loads(tmp_path, capsys):
    cfg = replace(CONFIGS["paper"], vocab_size=60)
    task = PretrainTask(cfg, EXPERTS, (Contrastive(5),))
    write_weights(task.state_dict(), tmp_path / "a" / "weights.safetensors", {"model": to_json(cfg)})
    write_text_model(tmp_path / "a" / "text.model", ["a red bus", "two dogs"] * 9, 40)
    assert main(["prune", str(tmp_path / "a"), str(tmp_path / "b"), "--heads", "2"]) == 0
    model = pretrain.load(tmp_path / "b")
    assert model.model == replace(cfg, heads=2, head_dim=8)
    assert model.similarity([picture()], ["a red bus"]).shape == (1, 1)
    for less, said in (
        (("--heads", "4"), "--heads 4 is wrong: the model has 4; use 1 to 3"),
        (("--zeros", "1.5"), "--zeros 1.5 is no share"),
    ):
        assert said in refused(capsys, main, "prune", tmp_path / "a", tmp_path / "c", *less)
    assert not (tmp_path / "c").exists()
