"""Each sample counts once, also where it comes again to fill up the last batch; and settings that an evaluation has
must reach its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pretrain.batch import BOS, EOS, Batch, Kinds, Layout, make_batch
from pretrain.data.labelled import LABEL, REFERENCES, LabelledShards, ReferenceShards
from pretrain.data.transforms import sample_rng
from pretrain.evals import captions
from pretrain.evals.captions import CaptionScore
from pretrain.evals.masked import MaskedAccuracy
from pretrain.evals.matching import MatchingAccuracy
from pretrain.evals.probe import Probe
from pretrain.evals.reconstruction import Reconstruction
from pretrain.evals.trained import Trained
from pretrain.models.generation import Writing

COUNT, SIZE = 5, 3
WORD = 4  # of the sample 0; those of the others follow


def trained(tmp_path, task: Any, make: Callable[[torch.Tensor], Batch]) -> Trained:
    """Of COUNT samples, in batches that `make` makes of their numbers; the last one begins again."""

    class Looping:
        def batches(self, first: int, steps: int) -> Iterator[tuple[Batch]]:
            for step in range(first, first + steps):
                yield (make(torch.arange(step * SIZE, (step + 1) * SIZE) % COUNT),)

    return Trained(
        task=task,
        device=torch.device("cpu"),
        directory=tmp_path,
        loader=lambda *_: Looping(),
        with_codes=lambda batch: batch,
        draw_codes=None,
        samples_of=lambda source: COUNT,
        masking=None,
        text=None,
    )


def grey(numbers: torch.Tensor) -> torch.Tensor:
    """Pictures of one value, their number."""
    return numbers.byte().view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


class Heads:
    """Says of each hidden patch and word what the sample 0 hides."""

    def predict(self, encoded, batch):
        batch = batch.indexed()
        hidden = {"image": batch.image_masks, "text": batch.text_masked}
        assert sum(batch.index.hidden_counts) == sum(mask.sum() for mask in hidden.values())
        targets = {"image": batch.image_codes[hidden["image"]], "text": batch.text_tokens[hidden["text"]]}
        said = {"image": 0, "text": WORD}
        return {name: (torch.full_like(target, said[name]), target) for name, target in targets.items()}


def test_masked_accuracy(tmp_path):
    """Pictures and texts of dual pairs beside pictures alone; each hides its only code or word."""

    def make(numbers):
        twice = torch.cat([numbers, numbers])
        ids = torch.stack([torch.full_like(numbers, BOS), numbers + WORD, torch.full_like(numbers, EOS)], 1)
        return make_batch(
            Layout(images=2 * SIZE, texts=SIZE, patches=1, text_len=3, dual=SIZE),
            images=grey(twice),
            image_masks=torch.ones(2 * SIZE, 1, dtype=torch.bool),
            image_codes=twice[:, None],
            text_tokens=ids,
            text_masked=torch.tensor([[False, True, False]]).expand(SIZE, -1),
        )

    task = SimpleNamespace(encoder=lambda batch: None, objectives={"masked": Heads()})
    mix = {"images": None, "dual": None}
    numbers, _ = MaskedAccuracy(mix, batch=SIZE).run(trained(tmp_path, task, make))
    assert numbers == {f"masked/{part}/{name}": 20 for part in ("image", "text") for name in ("accuracy", "baseline")}


def test_matching(tmp_path):
    """A model that knows the answers for the picture 0 alone, and says yes of all others."""

    def make(numbers):
        ids = torch.stack([torch.full_like(numbers, BOS), numbers + WORD, torch.full_like(numbers, EOS)], 1)
        return make_batch(Layout(pairs=SIZE, patches=1, pair_len=3), images=grey(numbers), pair_tokens=ids)

    def encode(batch, needed):
        number = batch.images[:, 0, 0, 0].long()
        fits = ((batch.pair_inputs[:, 1] == number + WORD) | (number > 0)).float()
        rows = torch.stack([1 - fits, fits], -1).unsqueeze(1)
        return Kinds(rows[:0], rows, rows[:0], rows[:0])

    task = SimpleNamespace(encoder=encode, objectives={"matching": SimpleNamespace(match=nn.Identity())})
    numbers, _ = MatchingAccuracy(None, batch=SIZE).run(trained(tmp_path, task, make))
    assert numbers == {"matching/accuracy": 60, "matching/baseline": 50, "matching/choice": 60}


def test_reconstruction(tmp_path):
    def make(numbers):
        return make_batch(Layout(images=SIZE, patches=1), images=grey(numbers))

    class Task:
        tokenizer = SimpleNamespace(cfg=SimpleNamespace(codes=10), encode=lambda images: images[:, :1, 0, 0].long())

        def __call__(self, batch):
            return {"loss/distill": batch.images.float().mean()}

    numbers, _ = Reconstruction(None, batch=SIZE).run(trained(tmp_path, Task(), make))
    wanted = {"tokenizer/distill_loss": 2.0, "tokenizer/codes_used": 50.0, "tokenizer/perplexity": 5.0}
    assert numbers == pytest.approx(wanted)


@pytest.mark.parametrize("rows", ["mean", "first"])
def test_a_probe_of_a_model_with_one_row_for_each_picture(tmp_path, rows):
    """As DualTowers, which had no patches whose mean could be taken: all vectors were NaN."""

    def make(numbers):
        extra = {LABEL: numbers % 2}
        return make_batch(Layout(images=SIZE, patches=1), images=grey(numbers), extra=extra)

    def encode(batch):
        number = batch.images[:, 0, 0, 0].float()
        rows = torch.stack([number % 2, 1 - number % 2], -1).unsqueeze(1)
        return Kinds(rows, rows[:0], rows[:0], rows[:0])

    source, task = LabelledShards("x", classes=2), SimpleNamespace(encoder=encode)
    probe = Probe(source, source, rows=rows, neighbours=1, penalties=(1e-3,), batch=SIZE)
    assert probe.run(trained(tmp_path, task, make))[0] == {"probe/k-NN": 100, "probe/linear": 100}


def test_captions_are_written_as_the_evaluation_says(tmp_path, monkeypatch):
    """With top_p each picture draws its words, by its own number, as pretrain.load's caption does."""
    asked: list[tuple[Writing, torch.Tensor]] = []

    def write(next_word, count, how, draws, device):
        asked.append((how, draws))
        return torch.tensor([[BOS, 5, EOS]]).expand(count, -1)

    monkeypatch.setattr(captions, "write", write)
    monkeypatch.setattr(captions, "text_reader", lambda *_: None)

    def make(numbers):
        extra = {REFERENCES: tuple([f"number {n}"] for n in numbers.tolist())}
        return make_batch(Layout(pairs=SIZE, patches=1, pair_len=9), images=grey(numbers),
                          pair_tokens=torch.full((SIZE, 9), EOS), extra=extra)  # fmt: skip

    task = SimpleNamespace(encoder=None, objectives={"captioning": SimpleNamespace(logits=None)})
    text = SimpleNamespace(mask_id=9, decode=lambda row: "number")
    writing = Writing(beams=1, top_p=0.9, temperature=0.5)
    evaluation = CaptionScore(ReferenceShards("x"), batch=SIZE, writing=writing)
    evaluation.run(replace(trained(tmp_path, task, make), text=text))
    assert [how for how, _ in asked] == [replace(writing, max_words=8)] * 2
    drawn = torch.cat([draws for _, draws in asked])
    assert [row.tolist() for row in drawn] == [sample_rng(0, 0, n).random(8).tolist() for n in range(2 * SIZE)]
