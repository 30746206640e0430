"""How often a fine-tuned stage is right, counted on made-up answers of its head."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pretrain.data.labelled import LabelledPairShards, LabelledShards, QuestionShards, TwoPictureShards
from pretrain.evals.labelled import EntailmentAccuracy, QuestionAccuracy, TopAccuracy, TwoPictureAccuracy


def trained(logits: list[torch.Tensor], extras: list[dict[str, Any]], samples: int) -> Any:
    """A stage whose head says `logits` in turn; the last batch is filled up, as the loader does."""
    said = iter(logits)
    head = SimpleNamespace(logits=lambda *_: next(said))
    batches = [SimpleNamespace(extra=extra) for extra in extras]
    return SimpleNamespace(
        head=lambda name: head,
        task=SimpleNamespace(encoder=lambda batch: None),
        samples_of=lambda source: samples,
        batches=lambda mix, size, count: iter(batches),
    )


def test_the_best_and_the_best_five_classes_count():
    first = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [9, 8, 7, 6, 5, 4, 3], [1, 1, 1, 1, 1, 1, 1], [float("nan")] * 7])
    again = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [0, 0, 0, 0, 0, 0, 1]])
    labels = [{"label": torch.tensor([0, 4, 3, 0])}, {"label": torch.tensor([5, 6])}]
    metrics, _ = TopAccuracy(LabelledShards("x"), batch=4).run(trained([first, again], labels, 5))
    # Of five pictures: right, fifth best, a tie that counts against us, a diverged model, sixth best; then the filling.
    assert metrics == pytest.approx({"classification/top-1": 20.0, "classification/top-5": 40.0})


def test_answers_are_scored_officially(tmp_path: Path):
    (tmp_path / "answers.json").write_text('["red", "blue"]')
    source = QuestionShards("x", vocabulary=str(tmp_path / "answers.json"))
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    given = [("red",) * 10, ("red",) * 7 + ("blue",) * 3, ("blue",) * 10]
    metrics, _ = QuestionAccuracy(source, batch=3).run(trained([logits], [{"answers": given}], 2))
    assert metrics["answers/accuracy"] == pytest.approx(100 * (1 + (7 * 1 + 3 * 2 / 3) / 10) / 2)


def test_sentences_are_right_or_wrong():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    labels = [{"label": torch.tensor([0, 0, 0])}]
    metrics, _ = TwoPictureAccuracy(TwoPictureShards("x"), batch=3).run(trained([logits], labels, 3))
    assert metrics == {"reasoning/accuracy": pytest.approx(200 / 3)}


def test_each_class_of_sentences_has_its_score():
    logits = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    names = ("entailment", "neutral", "neutral", "")
    extras = [{"label": torch.tensor([0, 1, 1, 2]), "label_name": names}] * 2
    metrics, _ = EntailmentAccuracy(LabelledPairShards("x"), batch=4).run(trained([logits, logits], extras, 5))
    assert metrics == pytest.approx(
        {
            "entailment/accuracy": 80.0,
            "entailment/accuracy/entailment": 100.0,
            "entailment/accuracy/neutral": 50.0,
            "entailment/accuracy/2": 100.0,  # a sample whose JSON names no class
        }
    )


@pytest.mark.parametrize("make", [lambda n: TopAccuracy(LabelledShards("x"), samples=n)])
def test_wrong_counts_are_one_sentence(make):
    with pytest.raises(ValueError, match="samples=0 is below 1"):
        make(0)
