from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import PAD, Batch, Layout, make_batch
from pretrain.config import BatchSize, Stage
from pretrain.data.sources import ImageShards, PairShards
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim
from pretrain.tasks.pretrain import PretrainTask, all_passes
from tests.toy_models import CODES, EXPERTS, PAPER, PATCHES, part_of, random_batch

MODEL = replace(PAPER, init_std=0.2)
LAYOUT = Layout(images=3, pairs=3, texts=3, patches=PATCHES, pair_len=7, text_len=9, dual=2)


def build(*objectives, drop_path: float = 0.0) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODEL, EXPERTS, objectives, drop_path=drop_path)


def by_hand(task: PretrainTask, pictures: Tensor, ids: Tensor, smoothing: float) -> list[Tensor]:
    """The loss of each word of one text, each from a pass that holds nothing but the picture and the words before."""
    losses = []
    for end in range(1, int((ids != PAD).sum())):
        layout = Layout(pairs=1, patches=PATCHES, pair_len=end, causal=True)
        prefix = make_batch(layout, images=pictures[None], pair_tokens=ids[None, :end])
        logits = task.objectives["captioning"].words.logits(task.encoder(prefix).pair_texts[0, -1])
        losses.append(F.cross_entropy(logits, ids[end], label_smoothing=smoothing))
    return losses


@pytest.mark.parametrize("mean_over", ["sequences", "targets"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_each_word_is_predicted_from_the_picture_and_the_words_before(smoothing, mean_over):
    task, batch = build(Captioning(smoothing=smoothing, mean_over=mean_over)), random_batch(LAYOUT)
    pairs = [(batch.images[3 + i], batch.pair_tokens[i]) for i in range(3)]
    pairs += [(batch.images[1 + i], batch.text_tokens[i]) for i in range(2)]
    losses = [by_hand(task, *pair, smoothing) for pair in pairs]
    means = losses if mean_over == "sequences" else [[loss] for own in losses for loss in own]
    want = torch.stack([torch.stack(own).mean() for own in means]).mean()
    torch.testing.assert_close(task(batch)["loss"], want, atol=2e-6, rtol=2e-6)
    assert len({len(own) for own in losses}) > 1, "or the two means would be one"


def test_hidden_words_and_patches_of_another_objective_change_nothing():
    batch = random_batch(LAYOUT)
    both, alone = build(Captioning(), MaskedData(image_codes=CODES)), build(Captioning())
    alone.load_state_dict({name: both.state_dict()[name] for name in alone.state_dict()})
    torch.testing.assert_close(both(batch)["loss/captioning"], alone(batch)["loss"])
    assert batch.pair_masked.any() and batch.image_masks.any()


def test_micro_batches_average_to_the_whole_with_the_samples_own_draws():
    task, batch = build(Captioning(), drop_path=0.5), random_batch(replace(LAYOUT, images=2, texts=2), drop_path=True)
    parts: list[Batch] = [
        replace(
            part_of(batch, slice(i, i + 1), slice(i, i + 1), slice(i, i + 1), dual=1),
            draws={name: own[[i, 2 + i, 5 + i]] for name, own in batch.draws.items()},
        )
        for i in range(2)
    ]
    whole = task(replace(part_of(batch, slice(2), slice(2), slice(2), dual=2), draws=first_two(batch)))["loss"]
    torch.testing.assert_close(torch.stack([task(part)["loss"] for part in parts]).mean(), whole)
    assert abs(task.eval()(parts[0])["loss"] - task.train()(parts[0])["loss"]) > 1e-3, "drop path dropped something"


def first_two(batch: Batch) -> dict[str, Tensor]:
    return {name: own[[0, 1, 2, 3, 5, 6]] for name, own in batch.draws.items()}


@pytest.mark.parametrize(
    ("objectives", "first"), [((Captioning(),), False), ((Captioning(), MaskedData(image_codes=CODES)), True)]
)
def test_the_passes_that_are_made_are_those_that_are_counted(objectives, first):
    """The batch's own is left out where no objective reads it."""
    seen: list[Layout] = []
    task = build(*objectives)
    task.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].layout))
    task(random_batch(LAYOUT))
    assert seen == [each.layout for each in all_passes(objectives, LAYOUT)]
    assert seen == [LAYOUT] * first + [each.layout for each in Captioning().passes(LAYOUT)]


def test_its_cost_is_that_of_the_pass_that_it_makes():
    (product,) = Captioning().products(LAYOUT, MODEL)
    assert product.rows == 5 * 9 and product.outputs == MODEL.vocab_size


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"smoothing": 1.0}, r"captioning\.smoothing=1\.0 is not a share; use at least 0 and less than 1"),
        ({"smoothing": float("nan")}, r"captioning\.smoothing=nan is not a share"),
        ({"mean_over": "words"}, r"captioning\.mean_over='words' is unknown; use sequences or targets"),
    ],
)
def test_options_that_it_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        Captioning(**options)


@pytest.mark.parametrize(
    ("mix", "experts", "said"),
    [
        ("images", EXPERTS, r"captioning needs pairs or dual in the mix \(mix=\['images'\]\); add one of them"),
        ("dual", ("vision",), r"experts=\['vision'\] lacks language; add what is missing"),
    ],
)
def test_stages_that_it_refuses(mix, experts, said):
    source = ImageShards("x") if mix == "images" else PairShards("x", text_len=8)
    with pytest.raises(ValueError, match=said):
        Stage(
            mix={mix: source}, batch=BatchSize(**{mix: 4}), optim=Optim(), steps=1, experts=experts,
            objectives=(Captioning(),),
        )  # fmt: skip
