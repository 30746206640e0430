"""Late fusion on the quickstart's corpus (see late_base.py): tiny_towers' CLIP, matching on a product of its rows; from
scratch. Sizes and rates are tiny's.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config import BatchSize
from pretrain.evals.matching import MatchingAccuracy
from pretrain.evals.retrieval import Retrieval
from pretrain.models.fusion.late import LateFusion
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.matching import Matching
from pretrain.recipes import tiny, tiny_towers, tiny_vlmo

RECIPE = replace(
    tiny.RECIPE,
    name="tiny_late",
    model=LateFusion(tiny_towers.CLIP.vision, tiny_towers.CLIP.text, **tiny_towers.COMMON, kind="bilinear"),
    stages={
        "fusion": replace(
            tiny_vlmo.FUSION,
            mix={"dual": tiny.PAIRS},
            batch=BatchSize(dual=64),
            experts=("vision", "language"),
            init_from=None,
            objectives=(Contrastive(embed_dim=128), Matching()),
            evals=(Retrieval(tiny.HELD_PAIRS, samples=256), MatchingAccuracy(tiny.HELD_PAIRS)),
        )
    },
)
