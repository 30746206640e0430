"""The neighbours at published size, on no device: as many parameters as the published models, and what ours add."""

from __future__ import annotations

import pytest
import torch

from pretrain.layers import PLAIN
from pretrain.recipes import find_recipe
from pretrain.run.build import check_model

# Of the released CLIP ViT-B/16, SigLIP base, ResNet-50 without its classes and BERT base without its pooler. Ours have
# rows for ids that a tokenizer lacks; BERT's has fewer positions, and two projections and a scale stand above the pair.
COUNTS = {
    "clip_base": 149_620_737 + 3 * 512,
    "siglip_base": 203_155_970 + 2 * 768,
    "resnet50_bert": 23_508_032 + 108_891_648 - (512 - 64) * 768 + (2048 + 768) * 512 + 1,
}

OTHERS = (
    "vilt_base",
    "albef_base",
    "vilbert_base",
    "blip_base",
    "align_base",
    "uniter_base",
    "depths_base",
    "late_base",
    "brivl_base",
)


@pytest.mark.parametrize("name", [*COUNTS, *OTHERS])
def test_they_are_built(name):
    recipe = find_recipe(name)
    (stage,) = recipe.stages.values()
    check_model(recipe, stage)
    if name in COUNTS:
        with torch.device("meta"):
            task = stage.task.build(recipe.model, stage, PLAIN, None)
        assert sum(value.numel() for value in task.parameters()) == COUNTS[name]
