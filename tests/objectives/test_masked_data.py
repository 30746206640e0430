from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.batch import Batch, Kinds, Layout, make_batch
from pretrain.config import BatchSize, Stage
from pretrain.cross_entropy import Scored
from pretrain.data.masking import Masking, combine
from pretrain.data.sources import TextShards
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import CODES, PAPER, PATCHES, part_of, pictures, random_batch
from tests.toys import needs

LAYOUT = Layout(images=2, pairs=3, texts=2, patches=PATCHES, pair_len=6, text_len=8)
BOTH = ("vision", "language")


def build(experts=BOTH, **options):
    return MaskedData(image_codes=CODES, **options).build(PAPER, experts)


def batch(seed: int = 0) -> Batch:
    made = random_batch(LAYOUT, seed)
    made.text_masked[1] = False  # a sequence without targets still counts as one
    return made


def rows(layout: Layout = LAYOUT, **options) -> Kinds:
    """Random final rows."""
    return Kinds.split(torch.randn(layout.rows, PAPER.dim, **options), layout)


def by_hand(head, rows, masked, targets) -> list[torch.Tensor]:
    """Each sequence's mean loss over its targets, one at a time."""
    losses = []
    for row, mask, target in zip(rows, masked, targets, strict=True):
        hits = [F.cross_entropy(head.logits(row[i]), target[i]) for i in range(len(mask)) if mask[i]]
        losses.append(torch.stack(hits).mean() if hits else torch.zeros(()))
    return losses


@pytest.mark.parametrize("transform", [False, True])
def test_the_loss_is_the_mean_over_sequences_of_the_mean_over_targets(transform):
    heads, encoded, b = build(transform=transform), rows(), batch()
    report = heads(encoded, b)
    parts = {
        "image": by_hand(heads.image, encoded.images[:, 1:], b.image_masks[:2], b.image_codes[:2]),
        "pair_image": by_hand(heads.image, encoded.pair_images[:, 1:], b.image_masks[2:], b.image_codes[2:]),
        "pair_text": by_hand(heads.words, encoded.pair_texts, b.pair_masked, b.pair_tokens),
        "text": by_hand(heads.words, encoded.texts, b.text_masked, b.text_tokens),
    }
    for name, losses in parts.items():
        torch.testing.assert_close(report[f"loss/{name}"], torch.stack(losses).mean())
    every = torch.stack([loss for losses in parts.values() for loss in losses])
    assert len(every) == 10
    torch.testing.assert_close(report["loss"], every.mean())


def test_the_transform_is_berts():
    needs("transformers")
    from transformers.models.bert.modeling_bert import BertConfig, BertPredictionHeadTransform

    heads, encoded = build(transform=True), rows()
    theirs = BertPredictionHeadTransform(BertConfig(hidden_size=PAPER.dim))
    with torch.no_grad():
        for own, value in zip(heads.transform.parameters(), theirs.parameters(), strict=True):
            value.copy_(own.normal_())
    want = heads.text.logits(theirs(encoded.texts))
    torch.testing.assert_close(heads.words.logits(encoded.texts), want)
    assert heads.words.predict(encoded.texts).equal(want.argmax(-1))


class Prices(torch.nn.Module):
    """A head whose loss at a row is the row's first number."""

    def forward(self, rows, targets, weights):
        return Scored((rows[:, 0] * weights).sum(), rows[:, 0], targets)


@pytest.mark.parametrize(
    ("mean_over", "terms", "image", "text", "loss"),
    [
        # Picture: 1, 2, 3. Texts: [4] and [10, 20, 30]. By sequence: 2; (4 + 20) / 2 = 12.
        ("sequences", "mean", 2.0, 12.0, (2 + 4 + 20) / 3),
        ("sequences", "sum", 2.0, 12.0, 2 + 12),
        # By target: 2; (4 + 10 + 20 + 30) / 4 = 16.
        ("targets", "mean", 2.0, 16.0, (1 + 2 + 3 + 4 + 10 + 20 + 30) / 7),
        ("targets", "sum", 2.0, 16.0, 2 + 16),
    ],
)
def test_the_four_forms_of_the_loss_by_numbers_made_by_hand(mean_over, terms, image, text, loss):
    layout = Layout(images=1, texts=2, patches=4, text_len=5)
    masks, masked = torch.zeros(1, 4, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    encoded = Kinds.split(torch.full((layout.rows, PAPER.dim), 1000.0), layout)
    masks[0, :3] = True
    encoded.images[0, 1:4, 0] = torch.tensor([1.0, 2, 3])
    masked[0, 2] = masked[1, 1:4] = True
    encoded.texts[0, 2, 0] = 4
    encoded.texts[1, 1:4, 0] = torch.tensor([10.0, 20, 30])
    b = random_batch(layout)
    b.image_masks[:], b.text_masked[:] = masks, masked
    heads = build(pair_image_ratio=0, pair_text_ratio=0, mean_over=mean_over, terms=terms)
    heads.image, heads.text = Prices(), Prices()
    report = heads(encoded, b)
    assert (report["loss/image"], report["loss/text"]) == (image, text)
    assert report["loss"].item() == pytest.approx(loss)
    masks[:], masked[:] = False, False
    b.image_masks[:], b.text_masked[:] = masks, masked
    nothing = heads(encoded, b)
    assert nothing["loss"] == 0 and nothing.keys() == report.keys(), "every rank reports the same names"


@pytest.mark.parametrize("wrong", [{"mean_over": "words"}, {"terms": "max"}], ids=str)
def test_unknown_forms_are_refused_in_a_sentence(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"masked.{name}='{value}' is unknown; use "):
        MaskedData(**wrong)


def test_accuracy_and_predictions_agree_with_an_oracle():
    heads, encoded, b = build(), rows(), batch()
    report, predictions = heads(encoded, b), heads.predict(encoded, b)
    for part, (prediction, target) in predictions.items():
        assert len(prediction) == len(target) > 0
        torch.testing.assert_close(report[f"accuracy/{part}"], (prediction == target).float().mean())
    torch.testing.assert_close(predictions["pair_text"][1], b.pair_tokens[b.pair_masked])
    best = heads.image.logits(encoded.images[:, 1:])[b.image_masks[:2]].argmax(-1)
    assert torch.equal(predictions["image"][0], best)


def test_splitting_the_batch_does_not_change_the_loss():
    heads, encoded, full = build(), rows(), batch(3)
    whole, *halves = (
        heads(Kinds(*(kind[own] for kind in encoded)), part_of(full, own, own, own))["loss"]
        for own in (slice(0, 2), slice(0, 1), slice(1, 2))
    )
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_heads_without_rows_still_get_zero_gradients():
    heads, layout = build(), Layout(images=2, patches=PATCHES)
    report = heads(rows(layout, requires_grad=True), make_batch(layout, images=pictures(2)))
    report["loss"].backward()
    assert report["loss"] == 0
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_stage_builds_only_the_heads_that_it_needs():
    assert build(("vision",)).text is None
    assert build(("language",)).image is None
    assert build(text_ratio=0, pair_text_ratio=0).text is None


def test_what_is_never_hidden_does_not_count():
    report = build(pair_image_ratio=0.0)(rows(), batch())
    assert "loss/pair_image" not in report
    parts = {"image": 2, "pair_text": 3, "text": 2}
    mean = sum(report[f"loss/{name}"] * count for name, count in parts.items()) / 7
    torch.testing.assert_close(report["loss"].detach(), mean)


def test_several_objectives_hide_the_most_that_one_of_them_asks_for():
    more_text, more_images = Masking(text_ratio=0.6, image_ratio=0.1), MaskedData(pair_image_ratio=0.7, text_ratio=0.2)
    assert combine([]) is None and combine([more_images]) is more_images
    assert combine([more_text, more_images]) == Masking(0.4, 0.6, 0.5, 0.7) == combine([more_images, more_text])


@pytest.mark.parametrize(("experts", "options"), [((), {}), (("vision",), {"image_ratio": 0, "pair_image_ratio": 0})])
def test_a_stage_that_hides_nothing_of_what_it_reads_is_one_sentence(experts, options):
    mix, batch = {"texts": TextShards("x")}, BatchSize(texts=4)
    with pytest.raises(ValueError, match=r"hides nothing that experts=\(.*\) read; give the stage the expert vision"):
        Stage(mix=mix, batch=batch, steps=1, experts=experts, objectives=(MaskedData(**options),), optim=Optim(lr=1e-3))


def test_masked_images_without_codes_are_a_programming_error():
    layout = Layout(images=1, patches=PATCHES)
    b = make_batch(layout, images=pictures(1), image_masks=torch.ones(1, PATCHES, dtype=torch.bool))
    with pytest.raises(AssertionError, match="visual tokenizer"):
        build(("vision",))(rows(layout), b)


def test_a_tied_text_head_has_the_text_embeddings_matrix_and_adds_to_its_gradient():
    torch.manual_seed(0)
    task = PretrainTask(PAPER, BOTH, (MaskedData(image_codes=CODES, tied_text_head=True),))
    table, head = task.encoder.text_embed.tokens.weight, task.objectives["masked"].text
    assert head.weight is table
    names = [name for name, _ in task.named_parameters()]
    assert "objectives.masked.text.weight" not in names and "objectives.masked.text.bias" in names
    b = batch()
    task(b)["loss"].backward()
    used = set(
        torch.cat([ids.flatten() for ids in (b.pair_inputs, b.text_inputs, b.pair_tokens, b.text_tokens)]).tolist()
    )
    unused = [row for row in range(PAPER.vocab_size) if row not in used]
    assert table.grad[unused].abs().sum() > 0, "the softmax reaches words that are in no text"


def test_heads_are_the_same_in_whatever_type_they_are_made():
    """zero.Init makes them in bf16."""
    heads = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            heads.append(build())
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(heads[0].image.weight.bfloat16(), heads[1].image.weight)
    assert torch.equal(heads[0].text.weight.bfloat16(), heads[1].text.weight)
