"""The visual tokenizer's codes on a GPU and on the CPU."""

from __future__ import annotations

import pytest
import torch

from pretrain.models.visual_tokenizer.vqkd import VQKD
from pretrain.run.image_targets import picture_codes
from tests.toy_models import VQ, pictures

pytestmark = pytest.mark.cuda


def tokenizer() -> VQKD:
    torch.manual_seed(0)
    made = VQKD(VQ).eval().requires_grad_(False)
    torch.nn.init.normal_(made.codebook.vectors)
    made.codebook.vectors.div_(made.codebook.vectors.norm(dim=-1, keepdim=True))
    return made


def lost(chosen: torch.Tensor, best: torch.Tensor, features: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """By how much the similarity to the chosen code is below that to the best."""
    features = torch.nn.functional.normalize(features.float(), dim=-1)
    return ((vectors[best] - vectors[chosen]) * features).sum(-1)


def test_codes_in_fp32_are_those_of_the_cpu_but_for_ties():
    images, model = pictures(64, VQ.image_size), tokenizer()
    here, features = model.encode(images), model.features(images)
    there = model.cuda().encode(images.cuda()).cpu()
    vectors = model.codebook.vectors.cpu()
    assert lost(there, here, features, vectors).max() < 1e-5


def test_codes_in_bf16_are_as_good_up_to_its_rounding():
    """What stored codes and those made in training have in common; bf16 has 8 binary digits."""
    images, model = pictures(64, VQ.image_size), tokenizer()
    here, features = model.encode(images), model.features(images)
    there = picture_codes(model.cuda(), images.cuda()).cpu()
    assert lost(there, here, features, model.codebook.vectors.cpu()).max() < 0.1
    assert torch.equal(there, picture_codes(model, images.cuda()).cpu()), "twice the same"
