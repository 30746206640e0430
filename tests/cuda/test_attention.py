"""The variable-length kernels against a mask: for every layout, width of a head and architecture."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pretrain.batch import Layout
from pretrain.models.attention import can_pack
from pretrain.models.multiway import encoder as multiway
from tests.cuda.near import assert_as_near, judged
from tests.models.test_attention import LONG, masked, no_padding, queries_keys_values, unpadded
from tests.toy_models import CONFIGS, PATCHES, encoder, random_batch

pytestmark = pytest.mark.cuda
WIDTHS = (32, 64, 88)  # of a head: the quickstart's, base's, giant's
ROUTES = {
    "masked data": Layout(3, 2, 4, PATCHES, 12, 12),
    "fusion": Layout(0, 2, 0, PATCHES, 12),
    "language": Layout(0, 0, 4, 0, 0, 12),
    "dual": Layout(3, 0, 3, PATCHES, 0, 12, dual=3),
}


def results(out: Tensor, read: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The rows that are read, and the gradients of what reads only them, of those inputs that have one."""
    read = read.to(out.device)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    gradients = torch.autograd.grad((out * weight)[read].sum(), inputs, allow_unused=True)
    return [out[read].detach(), *(value for value in gradients if value is not None)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("layout", LONG, ids=str)
def test_packed_is_masked(layout: Layout, width: int, padded: bool):
    batch = random_batch(layout, padded=padded)
    read, there = no_padding(batch), batch.indexed().to("cuda")
    short = [value.detach().cuda().bfloat16().requires_grad_() for value in queries_keys_values(layout, width)]
    exact = [value.detach().float().requires_grad_() for value in short]  # the same numbers
    assert can_pack(short[0], layout, width)
    packed = results(unpadded(short, there, packed=True), read, short)
    plain = results(masked(short, there), read, short)
    assert_as_near(packed, plain, results(masked(exact, there), read, exact))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_that_packs_is_one_that_masks(name: str, route: str, width: int, monkeypatch):
    """VLMo's bias keeps it from packing: there both are one way, and are near fp32."""
    cfg = replace(CONFIGS[name], dim=CONFIGS[name].heads * width)
    batch = random_batch(ROUTES[route], cfg=cfg)
    read, there = no_padding(batch), batch.indexed().to("cuda")
    short, exact = (encoder(cfg).cuda().bfloat16() for _ in range(2))
    exact = exact.float()  # the same numbers
    packed = results(short.rows(there), read, judged(short))
    monkeypatch.setattr(multiway, "can_pack", lambda *_: False)
    plain = results(short.rows(there), read, judged(short))
    assert_as_near(packed, plain, results(exact.rows(there), read, judged(exact)))
