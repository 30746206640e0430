"""UNITER on the quickstart's corpus (see uniter_base.py): a single stream over a picture's features, matching against
random partners, words aligned with patches, masked words; from scratch, in as many steps of as many pairs as
tiny_vlmo's third stage. Sizes and rates are tiny's.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.models.fusion.single_stream import SingleStream
from pretrain.objectives.matching import Matching
from pretrain.recipes import tiny, tiny_vlmo

RECIPE = replace(
    tiny.RECIPE,
    name="tiny_uniter",
    model=SingleStream(
        dim=128,
        heads=4,
        ffn_dim=512,
        depth=4,
        vit_dim=128,
        vit_heads=4,
        vit_depth=2,
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
            objectives=(Matching("random", alignment=0.1), tiny_vlmo.WORDS),
            evals=(MatchingAccuracy(tiny.HELD_PAIRS), MaskedAccuracy({"pairs": tiny.HELD_PAIRS})),
        )
    },
)
