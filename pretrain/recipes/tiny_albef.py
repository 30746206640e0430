"""ALBEF on the quickstart's corpus (see albef_base.py), from scratch, in as many steps of as many pairs as tiny_vlmo's
third stage. Sizes and rates are tiny's; queue and momentum are made for 600 steps.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.models.fusion.text_queries_image import TextQueriesImage
from pretrain.objectives.matching import Matching
from pretrain.objectives.momentum import MomentumContrast
from pretrain.recipes import tiny, tiny_vlmo

RECIPE = replace(
    tiny.RECIPE,
    name="tiny_albef",
    model=TextQueriesImage(
        dim=128,
        heads=4,
        ffn_dim=512,
        image_depth=4,
        text_depth=2,
        fusion_depth=2,
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
            objectives=(
                MomentumContrast(embed_dim=128, momentum=0.98, queue=512, ramp_steps=300),
                Matching(),
                tiny_vlmo.WORDS,
            ),
        )
    },
)
