"""ViLT on the quickstart's corpus (see vilt_base.py): one stream, matching against random partners, masked words; from
scratch, in as many steps of as many pairs as tiny_vlmo's third stage. Sizes and rates are tiny's.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.objectives.matching import Matching
from pretrain.recipes import tiny, tiny_vlmo

RECIPE = replace(
    tiny.RECIPE,
    name="tiny_vilt",
    model=replace(tiny.MODEL, ffn="shared", fusion_layers=0, text_norm=True),
    stages={
        "fusion": replace(
            tiny_vlmo.FUSION,
            experts=("vision", "language"),
            init_from=None,
            objectives=(Matching("random"), tiny_vlmo.WORDS),
            evals=(MatchingAccuracy(tiny.HELD_PAIRS), MaskedAccuracy({"pairs": tiny.HELD_PAIRS})),
        )
    },
)
