"""The sizes are the published ones, counted on the meta device."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.models.multiway import sizes
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.objectives.masked import MaskedData
from pretrain.parallel.state import dense_shape


def count(cfg: MultiwayConfig, *parts: str, without: str = "no such name") -> int:
    """Parameters whose name holds one of `parts` (all of them when none is given), without a vocabulary's padding."""
    with torch.device("meta"):
        model = MultiwayEncoder(cfg)
    named = [(name, math.prod(dense_shape(p))) for name, p in model.named_parameters()]
    return sum(n for name, n in named if (not parts or any(part in name for part in parts)) and without not in name)


@pytest.mark.parametrize(
    ("part", "millions"),
    [("experts.vision.", 692), ("experts.language.", 692), ("experts.fusion.", 52), (".attention.", 317)],
)
def test_the_giant_has_the_parts_of_the_papers_table_2(part, millions):
    """Matrices and biases; the norms are 0.1 M more for each of the first two."""
    assert round(count(sizes.BEIT3_GIANT, part, without="norm") / 1e6) == millions


def test_the_giant_has_1_9_billion_parameters():
    """The paper's total. Ours: the four parts 1754 M, embeddings 91.6 M; without the heads (90 M for text, 12 M for
    images), with them 1.95 billion. The paper does not say whether it counts them: 1.9 lies between."""
    encoder = count(sizes.BEIT3_GIANT)
    heads = (sizes.BEIT3_GIANT.dim + 1) * (sizes.BEIT3_GIANT.vocab_size + MaskedData().image_codes)
    assert encoder / 1e9 == pytest.approx(1.846, abs=0.001)
    assert (encoder + heads) / 1e9 == pytest.approx(1.948, abs=0.001)


@pytest.mark.parametrize(
    ("cfg", "pretrained", "retrieval"),
    [(sizes.BEIT3_BASE_RELEASED, 276, 222), (sizes.BEIT3_LARGE_RELEASED, 746, 674)],
)
def test_the_released_sizes_have_the_readmes_totals(cfg, pretrained, retrieval):
    """unilm's beit3/README gives whole millions, rounded down. 276 and 746: encoder, untied text head (64010), image
    head (8192), both with biases. 222 and 674, the `itc` checkpoints: encoder and two projections without biases."""
    encoder = count(cfg)
    assert (encoder + (cfg.dim + 1) * (cfg.vocab_size + MaskedData().image_codes)) // 1_000_000 == pretrained
    assert (encoder + 2 * cfg.dim**2) // 1_000_000 == retrieval


def test_the_released_base_has_torchscales_parameters():
    """torchscale 0.3.0's BEiT3 at base size has 220,987,392: ours and the two unused rows of each position table."""
    assert count(sizes.BEIT3_BASE_RELEASED) + 2 * 2 * 768 == 220_987_392


@pytest.mark.parametrize(
    ("cfg", "millions"), [(sizes.VLMO_BASE, 175), (sizes.VLMO_BASE_PLUS, 167), (sizes.VLMO_LARGE, 562)]
)
def test_vlmo_has_the_published_totals(cfg, millions):
    """175.4, 166.7 and 561.5 M against 175, 167 and 562 M. Ours is the encoder without heads and token types; the
    papers do not say what they count. VLMo's pooler would add 0.6, 0.3 and 1.0 M."""
    assert count(cfg) / 1e6 == pytest.approx(millions, abs=0.6)


def test_a_stage_counts_only_its_experts():
    with torch.device("meta"):
        vision = MultiwayEncoder(sizes.BEIT3_BASE, ("vision",))
    total = sum(p.numel() for p in vision.parameters())
    assert total / 1e6 == pytest.approx(85.8, abs=0.1)  # ViT-B/16 of BEiT: 86 M
