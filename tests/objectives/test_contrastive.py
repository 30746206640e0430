from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.batch import Kinds, Layout, make_batch
from pretrain.distributed import rank, world_size
from pretrain.objectives.contrastive import Contrastive
from tests.distributed import run_ranks
from tests.toy_models import PAPER

WIDTH = PAPER.dim


def dual(count: int) -> Kinds:
    """Random final rows of `count` images (5 rows each) and texts (4 rows each)."""
    made = torch.Generator().manual_seed(0)
    none = torch.zeros(0, 0, WIDTH)
    images, texts = (torch.randn(count, length, WIDTH, generator=made) for length in (5, 4))
    return Kinds(images, none, none, texts)


def score(head, encoded: Kinds, alone: int = 0):
    """The first `alone` images and the last `alone` texts have no partner."""
    images, texts = len(encoded.images), len(encoded.texts)
    layout = Layout(images=images, texts=texts, patches=4, text_len=4, dual=images - alone)
    return head(encoded, make_batch(layout))


def build():
    torch.manual_seed(1)
    return Contrastive().build(PAPER, ("vision", "language"))


def on_each_rank() -> tuple[float, dict]:
    head = build()
    per = 6 // world_size()
    mine = slice(rank() * per, (rank() + 1) * per)
    report = score(head, Kinds(*(kind[mine] for kind in dual(6))))
    report["loss"].backward()
    return report["loss"].item(), {name: p.grad for name, p in head.named_parameters()}


@pytest.mark.parametrize("alone", [0, 2])
def test_it_is_the_symmetric_cross_entropy_of_class_rows_and_first_words(alone):
    head, encoded, pairs = build(), dual(6), 6 - alone
    report = score(head, encoded, alone)
    i = F.normalize(head.vision(encoded.images[alone:, 0]), dim=-1)
    t = F.normalize(head.language(encoded.texts[:pairs, 0]), dim=-1)
    logits = i @ t.T / 0.07
    right = torch.arange(pairs)
    expected = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(report["loss"], expected)
    torch.testing.assert_close(report["accuracy/image_to_text"], (logits.argmax(1) == right).float().mean())


def test_only_first_rows_of_dual_pairs_are_read():
    layout = Layout(images=3, pairs=1, texts=4, patches=4, pair_len=3, text_len=4, dual=2)
    needed = build().needed_rows(make_batch(layout))
    assert needed.images.nonzero().tolist() == [[1, 0], [2, 0]]
    assert needed.texts.nonzero().tolist() == [[0, 0], [1, 0]]
    assert not needed.pair_images.any() and not needed.pair_texts.any()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_average_to_the_loss_and_gradients_of_the_whole_batch(ranks):
    head = build()
    whole = score(head, dual(6))["loss"]
    whole.backward()
    results = run_ranks(on_each_rank, ranks)
    assert abs(sum(loss for loss, _ in results) / ranks - whole.item()) < 1e-6
    for name, parameter in head.named_parameters():
        mean = sum(grads[name] for _, grads in results) / ranks
        torch.testing.assert_close(mean, parameter.grad, atol=3e-6, rtol=1e-5)  # rounding at a scale of 14


def test_the_scale_never_exceeds_a_hundred():
    head = build()
    with torch.no_grad():
        head.logit_scale.fill_(math.log(1e6))
    report = score(head, dual(4))
    assert report["logit_scale"].item() == pytest.approx(100)
    report["loss"].backward()
    assert head.logit_scale.grad.abs().item() > 0, "it could never come back"
