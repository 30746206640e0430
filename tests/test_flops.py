"""FLOPs against known numbers, and the peaks of data sheets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pretrain import flops
from pretrain.batch import Layout
from pretrain.contracts import Pass
from pretrain.flops import Product, encoder_flops, flops_per_sequence, peak_flops, product_flops
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pretrain import Pretrain
from tests.toy_models import PAPER

BASE = {"dim": 768, "depth": 12, "ffn_dim": 3072}


def test_flops_of_a_sequence_are_counted_product_by_product():
    # length 5, dim 4, ffn 8: q, k, v, out; two of the feed-forward; scores and values of 5 x 5.
    products = 4 * (5 * 4 * 4) + 2 * (5 * 4 * 8) + 2 * (5 * 5 * 4)
    assert flops_per_sequence(5, dim=4, depth=3, ffn_dim=8) == 3 * 3 * 2 * products


def test_flops_of_vit_base_are_the_published_17_5_gflops():
    # DeiT and timm: ViT-B/16 at 224, 17.6 G multiply-adds forward (the head of 1000 classes is 0.0008 of it).
    layout = Layout(images=1, patches=196)
    forward = (encoder_flops(layout, **BASE, patch_inputs=768) + product_flops([Product(1, 768, 1000)])) / 3
    assert forward / 2 == pytest.approx(17.56e9, rel=0.005)


def test_flops_of_a_beit3_base_step_are_0_72_petaflop():
    """The paper's batch, 2048 of each kind; the number was derived independently of this code."""
    layout = Layout(images=2048, pairs=2048, texts=2048, patches=196, pair_len=64, text_len=196)
    assert encoder_flops(layout, **BASE, patch_inputs=768) == pytest.approx(0.72e15, rel=0.01)


def test_flops_add_up_over_kinds_and_heads():
    mixed = encoder_flops(Layout(images=2, pairs=3, texts=4, patches=9, pair_len=6, text_len=16), **BASE)
    images = encoder_flops(Layout(images=2, patches=9), **BASE)
    # A pair is as long as a text here: neither may swallow the other.
    assert mixed == images + 7 * flops_per_sequence(16, **BASE)
    assert encoder_flops(Layout(texts=4, text_len=16), **BASE) == 4 * flops_per_sequence(16, **BASE)
    assert encoder_flops(Layout(), **BASE) == 0
    heads = Product(7, 768, 9), Product(2, 4, 3, classes=True)
    assert product_flops(heads) == 3 * 2 * (7 * 768 * 9 + 2 * 4 * 3)


@pytest.mark.parametrize(("backward", "factor"), [(True, 2), (False, 4 / 3)])
def test_a_further_pass_counts_as_whole_or_forward_only(backward, factor):
    class Twice(MaskedData):
        def passes(self, layout):
            return [Pass(layout, backward)]

        def products(self, layout, model):
            return []

    layout = Layout(images=2, patches=PAPER.patches)
    counted = Pretrain().flops(PAPER, SimpleNamespace(objectives=(Twice(),)), layout)
    assert counted == pytest.approx(factor * PAPER.flops(layout))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Some future card", None),
    ],
)
def test_peak_is_that_of_the_data_sheet(name, peak):
    assert flops._peak_of(name) == peak
    assert peak_flops("cpu") is None
