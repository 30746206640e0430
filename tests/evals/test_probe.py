"""Classes from frozen vectors and from names alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.labelled import LABEL, LabelledShards
from pretrain.evals.attentive import Rows, attentive_answers, check_size
from pretrain.evals.probe import Probe, linear_answers, nearest_vote
from pretrain.evals.zero_shot import ZeroShot, class_vectors, read_names


def clouds(count: int, seed: int, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around three places in 8 dimensions, the first of which is far more spread out."""
    drawn = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % 3
    places = torch.eye(8)[1:4] * 3
    noise = torch.randn(count, 8, generator=drawn) * spread
    noise[:, 0] *= 100
    return places[label] + noise, label


def test_a_linear_classifier_sees_through_a_large_dimension():
    (train, label), (test, right) = clouds(300, 0), clouds(90, 1)
    assert (linear_answers(train, label, test, 3, (1e-3, 1e-1)) == right).double().mean() > 0.95


def test_its_penalty_is_that_of_the_objective():
    """At the optimum the gradient of cross-entropy is minus that of the penalty."""
    from pretrain.evals.probe import _fit

    train, label = clouds(60, 2)
    weight, bias = _fit(train / train.std(0), label, 3, 0.01)
    weight.requires_grad_()
    F.cross_entropy(train / train.std(0) @ weight + bias, label).backward()
    torch.testing.assert_close(weight.grad, -0.02 * weight.detach(), rtol=0, atol=1e-4)


def test_near_votes_weigh_more():
    train = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.8, -0.6], [0.0, 1.0]])
    label = torch.tensor([0, 1, 1, 2])
    assert nearest_vote(train, label, torch.tensor([[2.0, 0.0], [0.0, 3.0]]), 3, 3).tolist() == [0, 2]


def test_names_become_the_mean_of_their_templates():
    def embed(texts):
        return F.normalize(torch.tensor([[float(len(text)), float(text.count("a"))] for text in texts]), dim=-1)

    vectors = class_vectors(embed, ["cat", "emu"], ("a {}", "{} and {}"))
    expected = F.normalize(embed(["a cat", "cat and cat"]).mean(0), dim=-1)
    torch.testing.assert_close(vectors[0], expected)
    with pytest.raises(ValueError, match=r"must be texts with \{\}"):
        class_vectors(embed, ["cat"], ("a photo",))


def test_wrong_settings_are_one_sentence(tmp_path):
    source = LabelledShards("x", classes=3)
    for build, words in (
        (lambda: Probe(source, source, rows="x"), "rows='x' is unknown"),
        (lambda: Probe(source, LabelledShards("x"), neighbours=3), "classes=3 and test 1000"),
        (lambda: Probe(source, source, penalties=()), "penalties=\\(\\) must be"),
        (lambda: ZeroShot(source, "x", templates="a {}"), "must be texts"),
        (lambda: read_names(str(tmp_path / "no.json")), "does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            build()
    (tmp_path / "labels.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no list of names"):
        read_names(str(tmp_path / "labels.json"))


def marked(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of 6 rows which all show some class, and only the one that carries a mark shows the picture's own."""
    drawn = torch.Generator().manual_seed(seed)
    shown = torch.randint(3, (count, 6), generator=drawn)
    place = torch.randint(6, (count,), generator=drawn)
    rows = F.one_hot(shown, 16).float() + 0.05 * torch.randn(count, 6, 16, generator=drawn)
    rows[torch.arange(count), place, 15] += 1
    return rows, shown[torch.arange(count), place]


def test_an_attentive_probe_finds_the_row_that_counts():
    (train, label), (test, right) = marked(1500, 0), marked(200, 1)
    before = torch.random.get_rng_state()
    said = attentive_answers(Rows(train.bfloat16(), label), test.bfloat16(), 3, epochs=25)
    assert (said == right).double().mean() > 0.95
    mean = linear_answers(train.mean(1), label, test.mean(1), 3)
    assert (mean == right).double().mean() < 0.75, "the mean of all rows does not say which one counts"
    assert torch.random.get_rng_state().equal(before)
    short = [attentive_answers(Rows(train.bfloat16(), label), test.bfloat16(), 3, epochs=1) for _ in range(2)]
    assert short[0].equal(short[1])


def test_all_probes_of_one_evaluation():
    train, test = marked(300, 0), marked(100, 1)
    names = {"train": train, "test": test}

    def batches(mix, size, samples):
        rows, label = names[mix["images"].shards]
        filled = torch.arange(-(-samples // size) * size) % samples  # the last batch begins again
        for some in filled.split(size):
            yield SimpleNamespace(rows=rows[some], extra={LABEL: label[some]})

    task = SimpleNamespace(encoder=lambda batch: SimpleNamespace(images=batch.rows))
    trained: Any = SimpleNamespace(samples_of=lambda source: len(names[source.shards][0]), batches=batches, task=task)
    sources = (LabelledShards(name, classes=3) for name in names)
    figures, _ = Probe(*sources, attentive=2, batch=64).run(trained)
    said = attentive_answers(Rows(train[0].bfloat16(), train[1]), test[0].bfloat16(), 3, epochs=2)
    assert figures["probe/attentive"] == 100 * (said == test[1]).double().mean().item()
    assert figures.keys() == {"probe/k-NN", "probe/linear", "probe/attentive"}


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"samples=28424 of Probe, or attentive=0"):
        check_size(1_281_167, 197, 767)
    with pytest.raises(ValueError, match="attentive=-1 is negative"):
        Probe(LabelledShards("x"), LabelledShards("x"), attentive=-1)
