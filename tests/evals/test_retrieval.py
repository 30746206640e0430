from __future__ import annotations

import torch

from pretrain.evals.retrieval import first_right, recall


def test_recall_counts_the_right_column_among_the_best():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.5, 0.7], [0.1, 0.2, 0.3]])
    right = torch.eye(3, dtype=torch.bool)
    assert first_right(scores, right).tolist() == [0, 2, 0]
    percent = recall(scores, right)
    assert round(percent["R@1"], 3) == 66.667 and percent["R@5"] == 100


def test_any_of_several_right_answers_will_do():
    scores = torch.tensor([[0.1, 0.9, 0.5]])
    assert first_right(scores, torch.tensor([[True, True, False]])).tolist() == [0]
    assert first_right(scores, torch.tensor([[True, False, False]])).tolist() == [2]


def test_a_collapsed_model_scores_nothing():
    """All scores equal: ties count against us."""
    assert recall(torch.zeros(50, 50), torch.eye(50, dtype=torch.bool))["R@1"] == 0


def test_recall_equals_counting_by_hand():
    made = torch.Generator().manual_seed(0)
    scores = torch.rand(40, 40, generator=made)
    hits = sum(int(scores[i].argsort(descending=True)[:5].tolist().count(i)) for i in range(40))
    assert recall(scores, torch.eye(40, dtype=torch.bool))["R@5"] == 100 * hits / 40


def test_a_diverged_model_scores_nothing():
    assert recall(torch.full((50, 50), float("nan")), torch.eye(50, dtype=torch.bool))["R@10"] == 0
