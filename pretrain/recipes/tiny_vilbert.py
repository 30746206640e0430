"""ViLBERT on the quickstart's corpus (see vilbert_base.py): two streams that attend to each other, matching against
random partners, masked words; from scratch, in as many steps of as many pairs as tiny_vlmo's third stage. Sizes and
rates are tiny's; the pictures' stream is wider than the words', as the published one.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.models.fusion.co_attention import CoAttention
from pretrain.objectives.matching import Matching
from pretrain.recipes import tiny, tiny_vlmo

RECIPE = replace(
    tiny.RECIPE,
    name="tiny_vilbert",
    model=CoAttention(
        dim=128,
        heads=4,
        ffn_dim=512,
        text_depth=4,
        image_dim=160,
        image_heads=4,
        image_ffn_dim=160,
        vit_depth=2,
        image_depth=2,
        text_at=(2, 3),
        image_at=(0, 1),
        co_dim=160,
        co_heads=4,
        image_size=64,
        patch_size=16,
        vocab_size=320,
        max_text_len=24,
        init_std=0.06,
    ),
    stages={
        "fusion": replace(
            tiny_vlmo.FUSION,
            init_from=None,
            objectives=(Matching("random"), tiny_vlmo.WORDS),
            evals=(MatchingAccuracy(tiny.HELD_PAIRS), MaskedAccuracy({"pairs": tiny.HELD_PAIRS})),
        )
    },
)
