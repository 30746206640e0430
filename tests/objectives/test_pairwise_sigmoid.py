"""SigLIP's loss in chunks and over ranks, against the plain formula and transformers' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout, make_batch
from pretrain.distributed import rank, visit_ranks, world_size
from pretrain.objectives import pairwise_sigmoid
from pretrain.objectives.contrastive import Contrastive, ContrastiveHead
from tests.distributed import run_ranks
from tests.toy_models import PAPER

COUNT = 12
# Texts in each other's place, which is the same on another rank: the first two of 2 ranks with 6 texts each, the others
# of 3 ranks with 4.
EXCHANGED = ((0, 6), (1, 5))


def vectors() -> tuple[Tensor, Tensor]:
    """Rows [12, 32] of images and of texts that are near their pictures, but for EXCHANGED."""
    made = torch.Generator().manual_seed(0)
    images = torch.randn(COUNT, PAPER.dim, generator=made)
    texts = images + 0.5 * torch.randn(COUNT, PAPER.dim, generator=made)
    for one, other in EXCHANGED:
        texts[[one, other]] = texts[[other, one]]
    return images, texts


def build(scale: float | None = None) -> ContrastiveHead:
    torch.manual_seed(1)
    head = Contrastive(loss="sigmoid").build(PAPER, ("vision", "language"))
    if scale is not None:  # with SigLIP's own start the rounding of others than the pairs would not show
        nn.init.constant_(head.logit_scale, scale)
        nn.init.constant_(head.logit_bias, -3.0)
        with torch.no_grad():
            head.language.weight.copy_(head.vision.weight)  # near rows become near vectors, whatever was drawn
    return head


def score(head: ContrastiveHead, mine: slice = slice(None)) -> dict[str, Tensor]:
    images, texts = (rows[mine, None] for rows in vectors())
    none = images.new_zeros(0, 0, PAPER.dim)
    layout = Layout(images=len(images), texts=len(texts), text_len=1, dual=len(images))
    batch: Batch = make_batch(layout)
    return head(Kinds(images, none, none, texts), batch)


def plain(head: ContrastiveHead) -> Tensor:
    images, texts = vectors()
    i, t = F.normalize(head.vision(images), dim=-1), F.normalize(head.language(texts), dim=-1)
    logits = head.logit_scale.exp() * i @ t.T + head.logit_bias
    return -F.logsigmoid((2 * torch.eye(COUNT) - 1) * logits).sum() / COUNT


def on_each_rank() -> tuple[dict[str, float], dict]:
    head, per = build(2.0), COUNT // world_size()
    report = score(head, slice(rank() * per, (rank() + 1) * per))
    report["loss"].backward()
    return {name: value.item() for name, value in report.items()}, {n: p.grad for n, p in head.named_parameters()}


@pytest.mark.parametrize("texts_of_a_chunk", [1, 5, 1000])
def test_chunks_give_the_plain_formula_and_its_gradients(monkeypatch, texts_of_a_chunk):
    monkeypatch.setattr(pairwise_sigmoid, "CHUNK", texts_of_a_chunk * COUNT)
    head, other = build(2.0), build(2.0)
    report, want = score(head), plain(other)
    torch.testing.assert_close(report["loss"], want, atol=1e-6, rtol=1e-6)
    (report["loss"] * 3).backward()
    (want * 3).backward()
    for mine, right in zip(head.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, right.grad, atol=1e-5, rtol=1e-5)


def test_it_begins_as_siglip():
    report = score(build())
    assert report["logit_scale"].item() == pytest.approx(10) and report["logit_bias"].item() == -10
    small = Contrastive(loss="sigmoid", project=False, bias=-4.0).build(PAPER, ())
    assert small.logit_bias.item() == -4 and small.logit_scale.exp().item() == pytest.approx(10)
    assert Contrastive().build(PAPER, ()).logit_bias is None


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_average_to_the_loss_accuracy_and_gradients_of_the_whole_batch(ranks):
    head = build(2.0)
    whole = score(head)
    whole["loss"].backward()
    results = run_ranks(on_each_rank, ranks)
    for name in ("loss", "accuracy/image_to_text"):
        assert sum(report[name] for report, _ in results) / ranks == pytest.approx(whole[name].item(), abs=1e-6)
    right = (COUNT - 2 * len(EXCHANGED)) / COUNT
    assert whole["accuracy/image_to_text"].item() == pytest.approx(right), "or a wrong rank's place would not show"
    for name, parameter in head.named_parameters():
        mean = sum(grads[name] for _, grads in results) / ranks
        torch.testing.assert_close(mean, parameter.grad, atol=3e-6, rtol=1e-5)


def visits() -> list[tuple[int, int]]:
    """(rows, distance) of what this rank is shown."""
    seen: list[tuple[int, int]] = []
    visit_ranks(torch.full((4, 3), float(rank())), lambda rows, distance: seen.append((len(rows), distance)))
    return seen


def test_no_more_than_one_ranks_rows_are_shown_at_once():
    assert run_ranks(visits, 3) == [[(4, 4 * (other - own)) for other in range(3)] for own in range(3)]


def test_it_is_the_loss_of_transformers_on_the_same_embeddings():
    from transformers import SiglipConfig, SiglipModel

    sizes = {"hidden_size": PAPER.dim, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 50, "max_position_embeddings": 8, "projection_size": PAPER.dim}
    torch.manual_seed(0)
    model = SiglipModel(
        SiglipConfig(text_config=text, vision_config=sizes | {"image_size": 16, "patch_size": 8})
    ).eval()
    nn.init.constant_(model.logit_scale, 2.0)
    nn.init.constant_(model.logit_bias, -3.0)
    out = model(torch.randint(3, 50, (6, 8)), torch.randn(6, 3, 16, 16), return_loss=True)
    scale, bias = model.logit_scale.exp(), model.logit_bias
    got = pairwise_sigmoid.pairwise_sigmoid(
        out.image_embeds, out.text_embeds, scale, bias, lambda rows, see: see(rows, 0)
    )
    torch.testing.assert_close(got.loss, out.loss, atol=1e-5, rtol=0)
    parameters = [value for value in model.parameters() if value.requires_grad]
    mine = torch.autograd.grad(got.loss, parameters, retain_graph=True)
    for own, right in zip(mine, torch.autograd.grad(out.loss, parameters), strict=True):
        torch.testing.assert_close(own, right, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss": "hinge"}, r"contrastive\.loss='hinge' is unknown; use softmax or sigmoid"),
        ({"bias": -4.0}, r"contrastive\.bias=-4\.0 is the sigmoid's; leave it out, or use loss='sigmoid'"),
        ({"loss": "sigmoid", "temperature": 0.1}, r"contrastive\.temperature=0\.1 .* leave temperature out"),
        ({"smoothing": 1.0}, r"contrastive\.smoothing=1\.0 is no share; use at least 0 and less than 1"),
        ({"loss": "sigmoid", "smoothing": 0.1}, r"contrastive\.smoothing=0\.1 is the softmax's; set 0, or use loss="),
        ({"project": False, "projection_bias": True}, r"projection_bias=True is a projection's .*; set False"),
    ],
)
def test_what_it_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        Contrastive(**options)
