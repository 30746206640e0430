"""Fine-tuning heads: against unilm's on the same weights, their losses, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.compare.others import torchscale_model
from pretrain.batch import BOS, PAD, Batch, Layout, make_batch
from pretrain.config import BatchSize, Stage
from pretrain.data.labelled import LabelledPairShards, LabelledShards, QuestionShards
from pretrain.data.sources import PairShards
from pretrain.data.transforms import ImageTransform
from pretrain.models.generation import NextWord, WholePass
from pretrain.objectives.answering import Answering
from pretrain.objectives.classification import ImageClassification
from pretrain.objectives.entailment import Entailment
from pretrain.objectives.masked_captioning import MaskedCaptioning
from pretrain.objectives.reasoning import Reasoning
from pretrain.optim import Optim
from pretrain.released_weights import from_released, to_released
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import PAIR_LEN, PATCHES, RELEASED, pictures, random_batch

BARE = replace(RELEASED, final_norm=False)
PAIRS = Layout(pairs=4, patches=PATCHES, pair_len=PAIR_LEN)


def made(objective: Any, cfg=RELEASED) -> PretrainTask:
    """With every number away from 0 and 1."""
    torch.manual_seed(1)
    task = PretrainTask(cfg, ("vision", "language"), [objective])
    with torch.no_grad():
        for value in task.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    return task.eval()


def reference(task: PretrainTask, cfg) -> tuple[Any, dict[str, Tensor]]:
    """torchscale's model with the weights, and all of them by unilm's names."""
    released = to_released(task.state_dict(), cfg)
    return torchscale_model(cfg, released).eval(), released


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def fused(model: Any, images: Tensor, ids: Tensor) -> Tensor:
    pixels = images.float() / 127.5 - 1
    return model(textual_tokens=ids, visual_tokens=pixels, text_padding_position=ids == PAD)["encoder_out"]


@torch.no_grad()
def test_classes_are_those_of_unilms_head():
    task = made(ImageClassification(6), BARE)
    model, state = reference(task, BARE)
    batch = random_batch(Layout(images=3, patches=PATCHES), cfg=BARE)
    batch = make_batch(batch.layout, images=batch.images)
    rows = model(textual_tokens=None, visual_tokens=batch.images.float() / 127.5 - 1)["encoder_out"]
    expected = linear(norm(rows[:, 1:].mean(1), state, "fc_norm"), state, "head")
    torch.testing.assert_close(task.objectives["classification"].logits(task.encoder(batch)), expected)
    assert "beit3.encoder.layer_norm.A.weight" not in state


@torch.no_grad()
def test_answers_are_those_of_unilms_head():
    task = made(Answering(9), BARE)
    model, state = reference(task, BARE)
    batch = clean(random_batch(PAIRS, cfg=BARE))
    pooled = linear(
        norm(fused(model, batch.images, batch.pair_tokens)[:, 0], state, "pooler.norm"), state, "pooler.dense"
    )
    hidden = F.gelu(norm(linear(pooled.tanh(), state, "head.0"), state, "head.1"))
    logits = task.objectives["answering"].logits(task.encoder(batch))
    torch.testing.assert_close(logits, linear(hidden, state, "head.3"), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_two_pictures_are_judged_as_by_unilms_head():
    task = made(Reasoning())
    model, state = reference(task, RELEASED)
    batch, second = clean(random_batch(PAIRS)), pictures(4, seed=9)
    batch = replace(batch, extra={"second": second, "label": torch.tensor([0, 1, 1, 0])})
    a, b = (fused(model, images, batch.pair_tokens) for images in (batch.images, second))
    split = PATCHES + 1
    rows = torch.cat([a[:, 0], a[:, split], b[:, 0], b[:, split]], -1)
    hidden = F.gelu(norm(linear(norm(rows, state, "head.norm1"), state, "head.dense1"), state, "head.norm2"))
    expected = linear(hidden, state, "head.dense2")
    logits = task.objectives["reasoning"].logits(task.encoder(batch), batch, task.encoder)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    loss = task(batch)["loss"]
    torch.testing.assert_close(loss, F.cross_entropy(expected, batch.extra["label"]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_hidden_words_of_captions_are_those_of_unilms_head():
    """With its mask: the text sees the picture and itself up to here, the picture only itself."""
    task = made(MaskedCaptioning(smoothing=0.0))
    model, state = reference(task, RELEASED)
    batch = random_batch(PAIRS, padded=False)
    batch = replace(batch, image_masks=torch.zeros_like(batch.image_masks))
    length, image = PAIR_LEN, PATCHES + 1
    hidden = torch.ones(image + length, image + length)
    hidden[:image, :image] = hidden[image:, :image] = 0
    hidden[image:, image:] = 1 - torch.ones(length, length).tril()
    pixels = batch.images.float() / 127.5 - 1
    rows = model(textual_tokens=batch.pair_inputs, visual_tokens=pixels, attn_mask=hidden)["encoder_out"][:, image:]
    logits = linear(rows[batch.pair_masked], state, "mlm_head")
    expected = F.cross_entropy(logits, batch.pair_tokens[batch.pair_masked])
    torch.testing.assert_close(task(batch)["loss"], expected, rtol=1e-5, atol=1e-5)
    # And generation asks the same: the row of a <mask> behind the words so far.
    reader = WholePass(task.encoder, batch.images, PATCHES)
    next_word = NextWord(reader, task.objectives["masked"].text.logits, 49, 49)
    scores = next_word(torch.full((4, 1), BOS))
    ids = torch.tensor([[BOS, 49]] * 4)
    hidden = hidden[: image + 2, : image + 2]
    row = model(textual_tokens=ids, visual_tokens=pixels, attn_mask=hidden)["encoder_out"][:, -1]
    torch.testing.assert_close(scores[:, 4:49], linear(row, state, "mlm_head").log_softmax(-1)[:, 4:49])


def clean(batch: Batch) -> Batch:
    """Without anything hidden."""
    return make_batch(batch.layout, images=batch.images, pair_tokens=batch.pair_tokens)


@pytest.mark.parametrize(
    ("objective", "cfg"),
    [(ImageClassification(6), BARE), (Answering(9), BARE), (Reasoning(), RELEASED), (MaskedCaptioning(), RELEASED)],
)
def test_released_names_come_back(objective, cfg):
    task = made(objective, cfg)
    released = to_released(task.state_dict(), cfg)
    assert not any(name.startswith("objectives") for name in released)
    state, back = from_released(released, heads=4)
    assert back == cfg and state.keys() == task.state_dict().keys()
    assert all(torch.equal(value, task.state_dict()[name]) for name, value in state.items())


def test_answers_are_scored_each_by_itself():
    task = made(Answering(3))
    batch = clean(random_batch(PAIRS))
    scores = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.0, 0.6], [0.0, 0.0, 0.0], [0.9, 0.9, 0.9]])
    logits = task.objectives["answering"].logits(task.encoder(batch))
    report = task(replace(batch, extra={"scores": scores}))
    each = -(scores * logits.sigmoid().log() + (1 - scores) * (1 - logits.sigmoid()).log())
    torch.testing.assert_close(report["loss"], each.sum(-1).mean())
    best = [scores[row, column] for row, column in enumerate(logits.argmax(-1))]
    assert report["accuracy/answers"].item() == pytest.approx(sum(map(float, best)) / 4)
    with pytest.raises(ValueError, match=r"answers=3 but the vocabulary of mix\.pairs has 4"):
        task(replace(batch, extra={"scores": torch.zeros(4, 4)}))


def test_classes_beside_other_kinds_are_those_of_the_images_alone():
    """Pictures of dual pairs have no label, and labels of pairs stand behind those of images."""
    task, layout = made(ImageClassification(6)), Layout(5, 2, 2, PATCHES, PAIR_LEN, PAIR_LEN, dual=2)
    drawn = random_batch(layout)
    texts = {"pair_tokens": drawn.pair_tokens, "text_tokens": drawn.text_tokens}
    batch, label = make_batch(layout, images=drawn.images, **texts), torch.tensor([5, 0, 3, 1, 1])
    report = task(replace(batch, extra={"label": label}))
    alone = make_batch(Layout(images=3, patches=PATCHES), images=batch.images[:3])
    torch.testing.assert_close(report["loss"], task(replace(alone, extra={"label": label[:3]}))["loss"])
    with pytest.raises(ValueError, match=r"mix\.images has labels beside mix\.pairs, whose labels entailment reads"):
        Stage(mix={"images": FOUR, "pairs": LabelledPairShards("x")}, batch=BatchSize(images=4, pairs=4),
              objectives=(Entailment(),), **COMMON)  # fmt: skip


def test_entailment_is_a_choice_by_the_layers_of_answers():
    """They are written under the names of unilm's answerer, and come back as one."""
    task, label = made(Entailment()), torch.tensor([0, 2, 1, 1])
    batch = replace(clean(random_batch(PAIRS)), extra={"label": label})
    head, encoded = task.objectives["entailment"], task.encoder(batch)
    report = task(batch)
    torch.testing.assert_close(report["loss"], F.cross_entropy(head.logits(encoded), label))
    assert report["accuracy/entailment"] == (head.logits(encoded).argmax(-1) == label).float().mean()
    state, _ = from_released(to_released(task.state_dict(), RELEASED), heads=4)
    answerer = made(Answering(3))
    answerer.load_state_dict(state)
    torch.testing.assert_close(answerer.objectives["answering"].logits(answerer.encoder(batch)), head.logits(encoded))


def test_heads_begin_as_there():
    torch.manual_seed(0)
    objectives = [ImageClassification(900), Reasoning(), Answering(900)]
    heads = PretrainTask(replace(RELEASED, dim=64, heads=4), ("vision", "language"), objectives).objectives
    layers = [heads["classification"].classes, heads["reasoning"].judge[0], heads["answering"].answer[3]]
    layers.append(Reasoning(scale=0.5).build(replace(RELEASED, dim=64, heads=4), ()).judge[0])
    stds = [layer.weight.detach().std().item() for layer in layers]
    assert stds == pytest.approx([0.02 * 0.001, 0.02 * 0.001, 0.02, 0.02 * 0.5], rel=0.05)


COMMON: dict[str, Any] = {"optim": Optim(), "steps": 3, "transform": ImageTransform(size=32)}


FOUR = LabelledShards("x", classes=4)


@pytest.mark.parametrize(
    ("kind", "source", "objective", "words"),
    [
        ("pairs", PairShards("x"), ImageClassification(5), "needs labels"),
        ("images", FOUR, ImageClassification(5), "classes=4; use one"),
        ("pairs", PairShards("x"), Answering(5), "needs questions"),
        ("pairs", QuestionShards("x"), Reasoning(), "needs sentences about two"),
        ("images", FOUR, MaskedCaptioning(), "captions need pairs"),
        ("pairs", PairShards("x"), Entailment(), "needs sentences with labels"),
        ("pairs", LabelledPairShards("x"), Entailment(4), "classes=3; use one"),
    ],
)
def test_the_wrong_data_is_one_sentence(kind, source, objective, words):
    with pytest.raises(ValueError, match=words):
        Stage(mix={kind: source}, batch=BatchSize(**{kind: 4}), objectives=(objective,), **COMMON)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ImageClassification(1),
        lambda: Answering(0),
        lambda: MaskedCaptioning(0.0),
        lambda: Entailment(1),
        lambda: Reasoning(0.0),
    ],
)
def test_wrong_settings_are_one_sentence(build):
    with pytest.raises(ValueError, match=r"; use|use 0\.7"):
        build()
