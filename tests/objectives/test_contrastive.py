from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pretrain.batch import Layout, make_batch
from pretrain.distributed import rank, world_size
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.contrastive import Contrastive
from tests.distributed import run_ranks

MODEL = MultiwayConfig(
    dim=16, depth=1, heads=2, ffn_dim=32, image_size=16, patch_size=8, vocab_size=50, max_text_len=8
)  # fmt: skip


def dual(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random final rows of `count` images (5 rows each) and texts (4 rows each)."""
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, 16, generator=made), torch.randn(count, 4, 16, generator=made)


def score(head, images, texts):
    layout = Layout(images=len(images), texts=len(texts), patches=5, text_len=4)
    return head(torch.cat([images.flatten(0, 1), texts.flatten(0, 1)]), make_batch(layout))


def build():
    torch.manual_seed(1)
    return Contrastive().build(MODEL, ("vision", "language"))


def on_each_rank() -> tuple[float, dict]:
    head = build()
    images, texts = dual(6)
    per = 6 // world_size()
    mine = slice(rank() * per, (rank() + 1) * per)
    report = score(head, images[mine], texts[mine])
    report["loss"].backward()
    return report["loss"].item(), {name: p.grad for name, p in head.named_parameters()}


def test_it_is_the_symmetric_cross_entropy_of_class_rows_and_first_words():
    head, (images, texts) = build(), dual(6)
    report = score(head, images, texts)
    i, t = F.normalize(head.vision(images[:, 0]), dim=-1), F.normalize(head.language(texts[:, 0]), dim=-1)
    logits = i @ t.T / 0.07
    right = torch.arange(6)
    expected = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(report["loss"], expected)
    torch.testing.assert_close(report["accuracy/image_to_text"], (logits.argmax(1) == right).float().mean())


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_average_to_the_loss_and_gradients_of_the_whole_batch(ranks):
    head, (images, texts) = build(), dual(6)
    whole = score(head, images, texts)["loss"]
    whole.backward()
    found = run_ranks(on_each_rank, ranks)
    assert abs(sum(loss for loss, _ in found) / ranks - whole.item()) < 1e-6
    for name, parameter in head.named_parameters():
        mean = sum(grads[name] for _, grads in found) / ranks
        torch.testing.assert_close(mean, parameter.grad, atol=3e-6, rtol=1e-5)  # rounding at a scale of 14


def test_the_scale_never_exceeds_a_hundred():
    head, (images, texts) = build(), dual(4)
    with torch.no_grad():
        head.logit_scale.fill_(math.log(1e6))
    report = score(head, images, texts)
    assert report["logit_scale"].item() == pytest.approx(100)
    report["loss"].backward()
    assert head.logit_scale.grad.abs().item() > 0, "it could never come back"
