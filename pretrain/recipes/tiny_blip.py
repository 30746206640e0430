"""BLIP on the quickstart's corpus (see blip_base.py), from scratch. Sizes and rates are tiny's; queue and momentum are
made for 600 steps.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize
from pretrain.evals.captions import CaptionScore, ReferenceShards
from pretrain.evals.matching import MatchingAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.decoder.encoder_decoder import EncoderDecoder
from pretrain.models.generation import Writing
from pretrain.objectives.matching import Matching
from pretrain.objectives.momentum import MomentumContrast
from pretrain.recipes import blip_base, tiny, tiny_vlmo

REFERENCES = ReferenceShards("$DATA/pairs/heldout", text_len=24)

RECIPE = replace(
    tiny.RECIPE,
    name="tiny_blip",
    model=EncoderDecoder(
        dim=128,
        heads=4,
        ffn_dim=512,
        image_depth=4,
        text_depth=4,
        image_size=64,
        patch_size=16,
        vocab_size=320,
        max_text_len=24,
        init_std=0.06,
    ),
    stages={
        "fusion": replace(
            tiny_vlmo.FUSION,
            mix={"dual": tiny.PAIRS},
            batch=BatchSize(dual=64),
            init_from=None,
            objectives=(
                MomentumContrast(embed_dim=128, momentum=0.98, queue=512, ramp_steps=300, projection_bias=True),
                Matching(),
                blip_base.WORDS,
            ),
            evals=(
                Retrieval(tiny.HELD_PAIRS, samples=256),
                MatchingAccuracy(tiny.HELD_PAIRS),
                CaptionScore(REFERENCES, samples=256, writing=Writing(3, 1.0, max_words=23)),
            ),
        )
    },
)
