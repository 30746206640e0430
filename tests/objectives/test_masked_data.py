from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.batch import Layout, make_batch
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pretrain import PretrainTask

MODEL = MultiwayConfig(
    dim=16, depth=1, heads=2, ffn_dim=32, image_size=16, patch_size=8, vocab_size=50, image_codes=12, max_text_len=8
)
LAYOUT = Layout(images=2, pairs=3, texts=2, patches=5, pair_len=6, text_len=8)


def batch(seed: int = 0):
    made = torch.Generator().manual_seed(seed)
    masks = {
        "image_masks": torch.rand(5, 4, generator=made) < 0.5,
        "pair_masked": torch.rand(3, 6, generator=made) < 0.5,
        "text_masked": torch.rand(2, 8, generator=made) < 0.3,
    }
    masks["text_masked"][1] = False  # a sequence without targets still counts as one
    return make_batch(
        LAYOUT,
        images=torch.zeros(5, 3, 16, 16, dtype=torch.uint8),
        pair_tokens=torch.randint(4, 50, (3, 6), generator=made),
        text_tokens=torch.randint(4, 50, (2, 8), generator=made),
        image_codes=torch.randint(12, (5, 4), generator=made),
        **masks,
    )


def by_hand(head, rows, masked, targets) -> list[torch.Tensor]:
    """Each sequence's mean loss over its targets, one at a time."""
    losses = []
    for row, mask, target in zip(rows, masked, targets, strict=True):
        hits = [F.cross_entropy(head.logits(row[i]), target[i]) for i in range(len(mask)) if mask[i]]
        losses.append(torch.stack(hits).mean() if hits else torch.zeros(()))
    return losses


def test_the_loss_is_the_mean_over_sequences_of_the_mean_over_targets():
    heads = MaskedData().build(MODEL, ("vision", "language"))
    rows, b = torch.randn(LAYOUT.rows, 16), batch()
    report = heads(rows, b)
    patches = rows[:25].view(5, 5, 16)[:, 1:]
    parts = {
        "image": by_hand(heads.image, patches[:2], b.image_masks[:2], b.image_codes[:2]),
        "pair_image": by_hand(heads.image, patches[2:], b.image_masks[2:], b.image_codes[2:]),
        "pair_text": by_hand(heads.text, rows[25:43].view(3, 6, 16), b.pair_masked, b.pair_tokens),
        "text": by_hand(heads.text, rows[43:].view(2, 8, 16), b.text_masked, b.text_tokens),
    }
    for name, losses in parts.items():
        torch.testing.assert_close(report[f"loss/{name}"], torch.stack(losses).mean())
    every = torch.stack([loss for losses in parts.values() for loss in losses])
    assert len(every) == 10
    torch.testing.assert_close(report["loss"], every.mean())


def test_accuracy_and_guesses_agree_with_an_oracle():
    heads = MaskedData().build(MODEL, ("vision", "language"))
    rows, b = torch.randn(LAYOUT.rows, 16), batch()
    report, guesses = heads(rows, b), heads.guesses(rows, b)
    for part, (guess, target) in guesses.items():
        assert len(guess) == len(target) > 0
        torch.testing.assert_close(report[f"accuracy/{part}"], (guess == target).float().mean())
    torch.testing.assert_close(guesses["pair_text"][1], b.pair_tokens[b.pair_masked])
    assert (
        guesses["image"][0] == heads.image.logits(rows[:10].view(2, 5, 16)[:, 1:])[b.image_masks[:2]].argmax(-1)
    ).all()


def test_splitting_the_batch_does_not_change_the_loss():
    heads = MaskedData().build(MODEL, ("vision", "language"))
    half = Layout(images=1, pairs=1, texts=1, patches=5, pair_len=6, text_len=8)
    both = Layout(images=2, pairs=2, texts=2, patches=5, pair_len=6, text_len=8)
    full = batch(3)
    rows = torch.randn(both.rows, 16)

    def part(of, keep_images, keep):
        return make_batch(
            half if len(keep) == 1 else both,
            images=of.images[keep_images],
            image_masks=of.image_masks[keep_images],
            image_codes=of.image_codes[keep_images],
            pair_tokens=of.pair_tokens[keep],
            pair_masked=of.pair_masked[keep],
            text_tokens=of.text_tokens[keep],
            text_masked=of.text_masked[keep],
        )

    sizes = [both.image_rows, both.pair_image_rows, both.pair_text_rows, both.text_rows]
    kinds = [kind.view(2, -1, 16) for kind in rows.split(sizes)]
    whole = heads(rows, part(full, [0, 1, 2, 3], [0, 1]))["loss"]
    halves = [heads(torch.cat([k[i] for k in kinds]), part(full, [i, 2 + i], [i]))["loss"] for i in (0, 1)]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_heads_without_rows_still_get_zero_gradients():
    heads = MaskedData().build(MODEL, ("vision", "language"))
    layout = Layout(images=2, patches=5)
    b = make_batch(layout, images=torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    report = heads(torch.randn(10, 16, requires_grad=True), b)
    report["loss"].backward()
    assert report["loss"] == 0
    for name, parameter in heads.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_stage_builds_only_the_heads_that_it_needs():
    assert MaskedData().build(MODEL, ("vision",)).text is None
    assert MaskedData().build(MODEL, ("language",)).image is None
    assert MaskedData(text_ratio=0, pair_text_ratio=0).build(MODEL, ("vision", "language")).text is None


def test_what_is_never_hidden_does_not_count():
    heads = MaskedData(pair_image_ratio=0.0).build(MODEL, ("vision", "language"))
    report = heads(torch.randn(LAYOUT.rows, 16), batch())
    assert "loss/pair_image" not in report
    parts = {"image": 2, "pair_text": 3, "text": 2}
    mean = sum(report[f"loss/{name}"] * count for name, count in parts.items()) / 7
    torch.testing.assert_close(report["loss"].detach(), mean)


def test_masked_images_without_codes_are_a_programming_error():
    heads = MaskedData().build(MODEL, ("vision",))
    b = make_batch(
        Layout(images=1, patches=5),
        images=torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        image_masks=torch.ones(1, 4, dtype=torch.bool),
    )
    with pytest.raises(AssertionError, match="visual tokenizer"):
        heads(torch.randn(5, 16), b)


def test_a_tied_text_head_has_the_text_embeddings_matrix_and_adds_to_its_gradient():
    torch.manual_seed(0)
    task = PretrainTask(MODEL, ("vision", "language"), (MaskedData(tied_text_head=True),))
    table, head = task.encoder.text_embed.tokens.weight, task.objectives["masked"].text
    assert head.weight is table
    names = [name for name, _ in task.named_parameters()]
    assert "objectives.masked.text.weight" not in names and "objectives.masked.text.bias" in names
    task(batch())["loss"].backward()
    used = set(batch().pair_tokens.unique().tolist()) | set(batch().text_tokens.unique().tolist())
    unused = [row for row in range(MODEL.vocab_size) if row not in used]
    assert table.grad[unused].abs().sum() > 0, "the softmax reaches words that are in no text"


def test_heads_are_the_same_in_whatever_type_they_are_born():
    """zero.Init makes them in bf16."""
    heads = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        torch.set_default_dtype(dtype)
        try:
            heads.append(MaskedData().build(MODEL, ("vision", "language")))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(heads[0].image.weight.bfloat16(), heads[1].image.weight)
    assert torch.equal(heads[0].text.weight.bfloat16(), heads[1].text.weight)
