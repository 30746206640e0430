"""Words aligned with patches: against loops over one pair after another, and what matching makes of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import BOS, EOS, PAD
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.objectives import alignment
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.tasks.pretrain import PretrainTask
from tests.models.decoder.test_encoder_decoder import MODEL as BLIP
from tests.models.decoder.test_encoder_decoder import QUERIES as ALBEF
from tests.models.fusion.test_co_attention import MODEL as TWO_WIDTHS
from tests.step_batches import DUAL, MODELS, dual_batch
from tests.toy_models import EXPERTS


def rows(count: int, words: int, patches: int, width: int = 6) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(count)
    return torch.randn(count, words, width, generator=made), torch.randn(count, patches, width, generator=made)


def plain_distance(words: Tensor, patches: Tensor) -> tuple[float, list[list[float]]]:
    """Of one pair without padding, [L, D] and [M, D]: the cost and its plan, number by number as algorithm 1 of arXiv
    1802.04307 has it, with one inner step."""
    cost = [[1 - float(F.cosine_similarity(w, p, dim=0)) for p in patches.double()] for w in words.double()]
    many, others = range(len(words)), range(len(patches))
    plan, sigma = [[1.0] * len(patches) for _ in many], [1 / len(words)] * len(words)
    for _ in range(alignment.ITERATIONS):
        pull = [[math.exp(-cost[i][j] / alignment.BETA) * plan[i][j] for j in others] for i in many]
        delta = [1 / (len(patches) * sum(pull[i][j] * sigma[i] for i in many)) for j in others]
        sigma = [1 / (len(words) * sum(pull[i][j] * delta[j] for j in others)) for i in many]
        plan = [[sigma[i] * pull[i][j] * delta[j] for j in others] for i in many]
    return sum(cost[i][j] * plan[i][j] for i in many for j in others), plan


def test_it_equals_loops_over_one_pair_after_another():
    words, patches = rows(4, 7, 5)
    words.requires_grad_()
    lengths = [7, 3, 1, 0]
    real = torch.arange(7) < torch.tensor(lengths).unsqueeze(1)
    got = alignment.distance(words, patches, real)
    plan = alignment.transport(1 - F.normalize(words, dim=-1) @ F.normalize(patches, dim=-1).mT, real).detach()
    for number, length in enumerate(lengths[:3]):
        wanted, plain = plain_distance(words[number, :length].detach(), patches[number])
        assert got[number].item() == pytest.approx(wanted, abs=1e-6)
        torch.testing.assert_close(plan[number, :length], torch.tensor(plain), rtol=1e-5, atol=1e-7)
        assert not plan[number, length:].any()
        torch.testing.assert_close(plan[number].sum(1)[:length], torch.full((length,), 1 / length), rtol=1e-4, atol=0)
    assert got[3] == 0, "a text without words"
    got.sum().backward()
    assert words.grad.isfinite().all() and words.grad[0].any() and not words.grad[1, 3:].any()


def test_words_that_are_patches_in_another_order_lie_near():
    words, _ = rows(1, 6, 1, width=32)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    real = torch.ones(1, 6, dtype=torch.bool)
    near = alignment.distance(words, words[:, order], real)
    far = alignment.distance(words, rows(2, 6, 1, width=32)[0][:1], real)
    assert near < 0.05 < 0.5 < far
    best = alignment.transport(1 - F.normalize(words, dim=-1) @ F.normalize(words[:, order], dim=-1).mT, real)
    assert best[0].argmax(0).tolist() == order.tolist()


def build(weight: float) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODELS["paper"], EXPERTS, (Matching("random", alignment=weight),))


def test_matching_adds_true_distances_and_takes_wrong_ones_away():
    """Of the words without BOS and EOS, in the pass that matching makes anyway."""
    batch, task, without = dual_batch(1), build(0.5).eval(), build(0.0).eval()
    seen = []
    task.encoder.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    got, plain = task(batch), without(batch)
    ((_, _), (pairs, out)) = seen
    real = (pairs.pair_tokens != PAD) & (pairs.pair_tokens != BOS) & (pairs.pair_tokens != EOS)
    apart = alignment.distance(out.pair_texts, out.pair_images[:, 1:], real)
    torch.testing.assert_close(got["distance/true"], apart[:DUAL].mean())
    torch.testing.assert_close(got["distance/wrong"], apart[DUAL:].mean())
    added = 0.5 * (apart[:DUAL].sum() - apart[DUAL:].sum()) / (3 * DUAL)
    torch.testing.assert_close(got["loss"], plain["loss"] + added)
    assert got["accuracy/matching"] == plain["accuracy/matching"] and abs(added) > 1e-4


STAGE = Stage(
    mix={"dual": PairShards("x", text_len=9)}, batch=BatchSize(dual=4), optim=Optim(), steps=1,
    objectives=(Matching("random", alignment=0.1),),
)  # fmt: skip


@pytest.mark.parametrize("model", [BLIP, ALBEF])
def test_models_without_patches_are_refused(model):
    with pytest.raises(ValueError, match=r"matching reads the patches of fused pairs, which .* does not fuse; take it"):
        Recipe(name="x", model=model, stages={"x": STAGE})
    Recipe(name="x", model=model, stages={"x": replace(STAGE, objectives=(Matching("random"), Captioning())[:1])})


def test_what_else_is_refused():
    with pytest.raises(ValueError, match=r"alignment=-1 is no weight; use 0 for none, or UNITER's 0\.1"):
        Matching(alignment=-1)
    with pytest.raises(ValueError, match=r"their rows have widths of 16 and 24; set alignment=0"):
        Matching("random", alignment=0.1).build(TWO_WIDTHS, ())
