"""One row of two: each kind against the same in plain torch, and two towers with it above them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pretrain.batch import Layout, make_batch
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.layers import PLAIN, Layers
from pretrain.models.fusion.late import LateFusion
from pretrain.models.fusion.pooled import KINDS, PooledFusion
from pretrain.models.towers.tower import Tower
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.tasks.pretrain import PretrainTask
from tests.models.fusion.two_ranks import check_equal
from tests.models.towers.others import SIZES, moved
from tests.step_batches import dual_batch

WIDER = SIZES | {"hidden_size": 24}
MODEL = LateFusion(
    Tower("clip_vision_model", WIDER), Tower("bert", SIZES), image_size=16, patch_size=4, vocab_size=32,
    max_text_len=10, kind="gated", pair_dim=20,
)  # fmt: skip


def rows(count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(1)
    return torch.rand(count, 6, generator=made), torch.rand(count, 4, generator=made)


def test_bilinear_equals_torchs_whose_tensor_is_the_product_of_both_matrices():
    fusion, whole = PooledFusion("bilinear", 6, 4, 3), nn.Bilinear(6, 4, 3, bias=False)
    with torch.no_grad():  # above 0, where the ReLUs do nothing
        for layer in (fusion.image, fusion.text):
            layer.weight.abs_()
        whole.weight.copy_(torch.einsum("ki,kj->kij", fusion.image.weight, fusion.text.weight))
    torch.testing.assert_close(fusion(*rows()), whole(*rows()))
    with torch.no_grad():
        fusion.image.weight[0].neg_()
    assert not fusion(*rows())[:, 0].any() and fusion(*rows())[:, 1:].all()


def test_gated_is_one_of_both_where_the_gate_is_all_open_or_shut():
    fusion, (image, text) = PooledFusion("gated", 6, 4, 3), rows()
    for bias, wanted in ((1e3, fusion.image(image)), (-1e3, fusion.text(text))):
        nn.init.constant_(fusion.joint.bias, bias)
        torch.testing.assert_close(fusion(image, text), wanted.tanh())
    nn.init.zeros_(fusion.joint.bias)
    nn.init.zeros_(fusion.joint.weight)
    half = (fusion.image(image).tanh() + fusion.text(text).tanh()) / 2
    torch.testing.assert_close(fusion(image, text), half)


def test_mlp_equals_two_layers_on_both_rows():
    fusion = PooledFusion("mlp", 6, 4, 3)
    plain = nn.Sequential(fusion.joint, nn.GELU(), fusion.out)
    torch.testing.assert_close(fusion(*rows()), plain(torch.cat(rows(), 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_two_towers_learn_to_match_and_count_their_products(kind):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = replace(MODEL, kind=kind)
    batch = dual_batch(1)
    task = PretrainTask(model, (), (Contrastive(embed_dim=8), Matching()))
    report = task(batch)
    report["loss"].backward()
    assert "accuracy/matching" in report
    assert not {name for name, value in task.named_parameters() if value.grad is None}
    encoder = moved(task.encoder)
    layout = Layout(pairs=8, patches=16, pair_len=10)
    pairs = make_batch(layout, images=batch.images[8:], pair_tokens=batch.text_tokens[:8])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        got = encoder(pairs)
    assert model.flops(pairs.layout) / 3 == pytest.approx(counted.get_total_flops(), rel=0.01)
    alone = encoder(batch)
    assert got.pair_images.shape == (8, 1, 20) and alone.pair_images.shape == (0, 1, 20)
    torch.testing.assert_close(got.pair_images[:, 0], encoder.pair(alone.images[8:, 0], alone.texts[:8, 0]))
    for other in ({"images": 255 - pairs.images}, {"pair_inputs": pairs.pair_inputs.roll(1, 0)}):
        changed = encoder(replace(pairs, **other)).pair_images
        assert not torch.allclose(changed, got.pair_images, atol=1e-4), other.keys()


def build(layers: Layers = PLAIN) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODEL, (), (Contrastive(temperature=0.5, embed_dim=16), Matching()), layers)


@pytest.mark.slow  # both ranks import transformers
def test_two_ranks_under_zero3_give_the_losses_of_one_process():
    """Its first pass fuses no pair."""
    check_equal(build, "zero3.json", ("loss", "loss/matching", "loss/contrastive"))


PAIRS = PairShards("x", text_len=10)


def stage(**changes) -> Stage:
    options = {"mix": {"dual": PAIRS}, "batch": BatchSize(dual=4), "optim": Optim(), "steps": 1,
               "objectives": (Contrastive(embed_dim=8), Matching())}  # fmt: skip
    return Stage(**(options | changes))


def test_a_stage_that_hides_words_or_drops_paths_is_refused():
    Recipe(name="x", model=MODEL, stages={"x": stage()})
    words = MaskedData(image_ratio=0, pair_image_ratio=0, pair_text_ratio=0.1)
    with pytest.raises(ValueError, match="masked hides words or patches, and LateFusion gives one row"):
        Recipe(name="x", model=MODEL, stages={"x": stage(objectives=(words,))})
    with pytest.raises(ValueError, match=r"drop_path=0\.1: LateFusion has none; set it to 0"):
        Recipe(name="x", model=MODEL, stages={"x": stage(drop_path=0.1)})
    with pytest.raises(ValueError, match=r"pictures have a width of 24 and texts of 16; set project=True"):
        Contrastive(project=False).build(MODEL, ())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "sum"}, r"model\.kind='sum' is unknown; use mlp, gated, bilinear"),
        ({"pair_dim": -1}, r"model\.pair_dim=-1 is negative; use a width, or 0 for the vision tower's"),
    ],
)
def test_shapes_that_it_refuses(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(MODEL, **changes)
