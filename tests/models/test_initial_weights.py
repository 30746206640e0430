"""The standard deviation that initial weights really have, for each of the papers' ways to draw them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from pretrain.batch import Layout, make_batch
from pretrain.layers import Classifier, Head, draw
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.sizes import BEIT3_BASE, BEIT3_BASE_RELEASED
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.recipes import tiny_vlmo

# The standard deviation of a unit normal distribution that ends at +-c: sqrt(1 - 2 c phi(c) / (2 Phi(c) - 1)).
CUT_AT_ONE, CUT_AT_TWO = 0.5396, 0.8796
# Full width, little else: the standard deviations depend on width and number of blocks.
SMALL = {"depth": 2, "image_size": 64, "vocab_size": 512, "max_text_len": 64}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stds(module: torch.nn.Module) -> dict[str, float]:
    return {name: parameter.std().item() for name, parameter in module.named_parameters() if parameter.dim() > 1}


@pytest.mark.parametrize(("cut", "share"), [(1.0, CUT_AT_ONE), (2.0, CUT_AT_TWO), (math.inf, 1.0)])
def test_a_cut_makes_weights_smaller_than_their_std_says(cut, share):
    drawn = draw(torch.empty(1000, 1000), 0.03, cut)
    assert drawn.std().item() == pytest.approx(0.03 * share, rel=0.005)
    assert (drawn.abs().max().item() <= 0.03 * cut) and drawn.mean().abs().item() < 1e-4


def test_beit3s_weights_lie_within_init_std():
    real = stds(MultiwayEncoder(replace(BEIT3_BASE, **SMALL, fusion_layers=1)))
    for layer in (1, 2):
        block, small = f"blocks.{layer - 1}", 0.02 / math.sqrt(2 * layer)
        for name in ("attention.q.shared", "attention.v.shared", "experts.vision.up", "experts.language.up"):
            assert real[f"{block}.{name}.weight"] == pytest.approx(0.02 * CUT_AT_ONE, rel=0.01), name
        for name in ("attention.out.shared", "experts.vision.down", "experts.language.down"):
            assert real[f"{block}.{name}.weight"] == pytest.approx(small * CUT_AT_ONE, rel=0.01), name
    for name in ("vision_embed.proj.weight", "text_embed.tokens.weight", "text_embed.positions"):
        assert real[name] == pytest.approx(0.02 * CUT_AT_ONE, rel=0.02), name


def test_magnetos_weights_are_xavier_normal():
    """Section 3.3: std gain * sqrt(2 / (inputs + outputs)), gain 1 for queries and keys and sqrt(ln 2N) elsewhere; for
    12 blocks of width 768 and inner width 3072 sqrt(1 / 768) = .0361, times 1.783 = .0643 and sqrt(2 / 3840) times it
    = .0407."""
    with torch.device("meta"):
        whole = MultiwayEncoder(BEIT3_BASE_RELEASED)  # depth decides the gain: draw one block of twelve
    block = whole.blocks[11].to_empty(device="cpu")
    for module in block.modules():
        if isinstance(module, torch.nn.Linear):
            module.reset_parameters()
    wanted = {"q": 0.03608, "k": 0.03608, "v": 0.06433, "out": 0.06433, "up": 0.04069, "down": 0.04069}
    real = {name: std for name, std in stds(block).items() if "norm" not in name}
    assert len(real) == 12
    for name, std in real.items():
        part = next(part for part in name.split(".") if part in wanted)
        assert std == pytest.approx(wanted[part], rel=0.01), name


@pytest.mark.parametrize(("init", "tokens", "matrices"), [("cut", CUT_AT_ONE, CUT_AT_TWO), ("normal", 1.0, 1.0)])
def test_the_visual_tokenizers_weights(init, tokens, matrices):
    """ "normal" is BEiT v2's: std 0.02 everywhere, output matrices of block l by sqrt(2 l)."""
    real = stds(VQKDConfig(depth=2, decoder_depth=1, codes=8, init=init).build())
    for part in ("encoder", "decoder"):
        assert real[f"{part}.positions"] == pytest.approx(0.02 * tokens, rel=0.01)
        assert real[f"{part}.class_row"] == pytest.approx(0.02 * tokens, rel=0.1)  # 768 numbers
        assert real[f"{part}.blocks.0.qkv.weight"] == pytest.approx(0.02 * matrices, rel=0.01)
        assert real[f"{part}.blocks.0.down.weight"] == pytest.approx(0.02 / math.sqrt(2) * matrices, rel=0.01)
        assert real[f"{part}_head.0.weight"] == pytest.approx(0.02 * matrices, rel=0.01)
    assert real["encoder.blocks.1.out.weight"] == pytest.approx(0.02 / 2 * matrices, rel=0.01)


def test_an_unknown_way_to_draw_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="tokenizer init='zeros'"):
        VQKDConfig(init="zeros")


def test_heads_are_not_cut():
    for weight in (Classifier(768, 512).weight, Head(768, 512).weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.01)
        assert weight.abs().max().item() > 0.06  # beyond three standard deviations


@torch.no_grad()
def test_the_class_rows_of_a_tiny_vlmo_begin_apart():
    """With VLMo's LayerScale of 0.1 they begin with a mean cosine of 0.99, and stay together for the steps of a small
    corpus."""
    pictures = torch.randint(256, (16, 3, 4, 4), dtype=torch.uint8).repeat_interleave(16, 2).repeat_interleave(16, 3)
    batch = make_batch(Layout(images=16, patches=16), images=pictures)
    rows = tiny_vlmo.MODEL.build(("vision", "language", "fusion")).eval()(batch).first.images
    cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows, dim=-1)
    assert (cosines.sum() - 16) / (16 * 15) < 0.8
