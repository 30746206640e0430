"""Words that attend to pictures at several depths, on the quickstart's corpus (see depths_base.py): matching against
random partners, masked words; from scratch, in as many steps of as many pairs as tiny_vlmo's third stage. Sizes are
tiny_albef's, whose words attend to the last depth alone; rates are tiny's.
"""

from __future__ import annotations

from dataclasses import fields, replace

from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.models.fusion.several_depths import SeveralDepths
from pretrain.models.fusion.text_queries_image import TextQueriesImage
from pretrain.objectives.matching import Matching
from pretrain.recipes import tiny, tiny_albef, tiny_vlmo

SIZES = {each.name: getattr(tiny_albef.RECIPE.model, each.name) for each in fields(TextQueriesImage)}

RECIPE = replace(
    tiny.RECIPE,
    name="tiny_depths",
    model=SeveralDepths(**SIZES, image_at=(2, 4)),
    stages={
        "fusion": replace(
            tiny_vlmo.FUSION,
            init_from=None,
            objectives=(Matching("random"), tiny_vlmo.WORDS),
            evals=(MatchingAccuracy(tiny.HELD_PAIRS), MaskedAccuracy({"pairs": tiny.HELD_PAIRS})),
        )
    },
)
