"""Dual towers on the quickstart's corpus, a stage each: CLIP, SigLIP, a ResNet beside a BERT, ALIGN, BriVL. They are
small versions of clip_base, siglip_base, resnet50_bert, align_base and brivl_base; sizes, rates and steps were chosen
by trying, on the budget of tiny's `scratch`. The text tokenizer is tiny's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pretrain.models.towers.dual import DualTowers
from pretrain.models.towers.tower import Tower
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.momentum import MomentumContrast
from pretrain.recipes import tiny

SIZES: dict[str, Any] = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 512}
# At a width of 128 nothing moves for hundreds of steps with the papers' 0.02 (see tiny.py).
BERT = Tower("bert", SIZES | {"initializer_range": 0.06})
COMMON: dict[str, Any] = {"image_size": 64, "patch_size": 16, "vocab_size": 320, "max_text_len": 24}
CLIP = DualTowers(Tower("clip_vision_model", SIZES), Tower("clip_text_model", SIZES, "eos"), **COMMON)
SIGLIP = DualTowers(
    Tower("siglip_vision_model", SIZES, "attention"),
    Tower("siglip_text_model", SIZES, "last", projection=128, bos=False),
    **COMMON,
)
RESNET = Tower(
    "resnet", {"layer_type": "basic", "embedding_size": 32, "hidden_sizes": [32, 64, 128], "depths": [1, 1, 1]}, "mean"
)
EFFICIENTNET = Tower(
    "align_vision_model", {"width_coefficient": 0.5, "depth_coefficient": 0.3, "strides": [1, 2, 2, 2, 1, 1, 1]}, "mean"
)
ALIGN_TEXT = Tower("align_text_model", BERT.settings, projection=EFFICIENTNET.rows_width)
STAGE = tiny.RECIPE.stages["scratch"]

RECIPE = replace(
    tiny.RECIPE,
    name="tiny_towers",
    model=CLIP,
    stages={
        "clip": replace(STAGE, objectives=(Contrastive(embed_dim=128),)),
        # -log(64) = -4.2, for batches of 64.
        "siglip": replace(STAGE, model=SIGLIP, objectives=(Contrastive(loss="sigmoid", project=False, bias=-4.0),)),
        "resnet_bert": replace(
            STAGE, model=DualTowers(RESNET, BERT, **COMMON), objectives=(Contrastive(embed_dim=128),)
        ),
        # Its temperature begins at 1 for batches of 16,384; in so few steps as here it does not come down by itself.
        "align": replace(
            STAGE,
            model=DualTowers(EFFICIENTNET, ALIGN_TEXT, **COMMON),
            objectives=(Contrastive(project=False, smoothing=0.1),),
        ),
        # A ResNet in the place of an EfficientNet, whose convolutions by channel are slow on a CPU; queue and momentum
        # are made for 300 steps.
        "brivl": replace(
            STAGE,
            model=DualTowers(replace(RESNET, pooling="attention"), replace(BERT, pooling="attention"), **COMMON),
            objectives=(MomentumContrast(embed_dim=128, momentum=0.98, queue=512, alpha=0.0),),
        ),
    },
)
