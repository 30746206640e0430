from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pretrain.batch import BOS, EOS, Kinds, Layout, make_batch
from pretrain.evals.matching import MatchingAccuracy


class Oracle(nn.Module):
    """Knows of each picture, by its first pixel, the caption: its one word."""

    def forward(self, batch, needed):
        assert needed.pair_images[:, 0].all() and needed.pair_images.sum() == batch.layout.pairs
        assert not needed.pair_texts.any()
        fits = (batch.images[:, 0, 0, 0].long() == batch.pair_inputs[:, 1]).float()
        rows = torch.stack([1 - fits, fits], -1).unsqueeze(1)
        return Kinds(rows[:0], rows, rows[:0], rows[:0])


def run(words: list[int], match: nn.Module) -> dict[str, float]:
    count = len(words)
    pictures = torch.tensor(words, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    ids = torch.tensor([[BOS, word, EOS] for word in words])
    batch = make_batch(Layout(pairs=count, patches=1, pair_len=3), images=pictures, pair_tokens=ids)
    trained = SimpleNamespace(
        task=SimpleNamespace(encoder=Oracle()),
        head=lambda name: SimpleNamespace(match=match),
        samples_of=lambda source: count,
        batches=lambda mix, size, samples: iter([batch]),
    )
    return MatchingAccuracy(None).run(trained)[0]


def test_a_perfect_model_and_one_that_always_says_yes():
    assert run([5, 6, 7], nn.Identity()) == {
        "matching/accuracy": 100, "matching/baseline": 50, "matching/choice": 100,
    }  # fmt: skip
    yes = nn.Linear(2, 2, bias=True)
    nn.init.zeros_(yes.weight)
    yes.bias.data = torch.tensor([0.0, 1.0])
    said = run([5, 6, 7], yes)
    assert said["matching/accuracy"] == said["matching/choice"] == 50


def test_one_that_says_no_to_everything_may_know_which_fits_better():
    no = nn.Linear(2, 2)
    no.weight.data, no.bias.data = torch.eye(2), torch.tensor([9.0, 0.0])
    said = run([5, 6, 7], no)
    assert said["matching/accuracy"] == 50 and said["matching/choice"] == 100


def test_the_same_caption_is_no_wrong_one():
    said = run([5, 5, 6], nn.Identity())
    assert said == {"matching/accuracy": 100, "matching/baseline": 60, "matching/choice": 100}


def test_a_batch_of_one_has_no_other_caption():
    with pytest.raises(ValueError, match="batch=1 leaves no other caption; use 2 or more"):
        MatchingAccuracy(None, batch=1)
