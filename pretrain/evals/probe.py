"""Classification by frozen vectors of pictures: nearest neighbours, and linear and attentive probes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.contracts import Evaluation
from pretrain.data.labelled import LABEL, LabelledShards
from pretrain.evals.attentive import Rows, attentive_answers, check_size
from pretrain.evals.trained import Trained, check_counts

ROWS = ("mean", "first")
CHUNK = 1024  # pictures whose neighbours are searched at once


@dataclass(frozen=True)
class Probe(Evaluation):
    """Percent of `test`'s pictures that each method classifies right after learning from `train`. `rows`: a picture's
    vector is the "mean" of its patches or its "first" row, the class row; a model that gives one row for each picture
    (DualTowers) has no other. The linear classifier's penalty is the best of `penalties` on every fifth picture of
    train. `attentive`: epochs of a probe that attends to all of a picture's rows (evals/attentive.py); 0: none."""

    train: LabelledShards
    test: LabelledShards
    rows: str = "mean"
    neighbours: int = 20
    penalties: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1)
    samples: int = 10**9
    batch: int = 128
    attentive: int = 0

    def __post_init__(self) -> None:
        if self.attentive < 0:
            raise ValueError(f"evals: attentive={self.attentive} is negative; use 0 for none")
        check_counts(samples=self.samples, batch=self.batch, neighbours=self.neighbours)
        if self.rows not in ROWS:
            raise ValueError(f"evals: rows={self.rows!r} is unknown; use {' or '.join(ROWS)}")
        if not self.penalties or not all(penalty > 0 for penalty in self.penalties):
            raise ValueError(f"evals: penalties={self.penalties} must be numbers above 0; use 1e-3")
        if self.train.classes != self.test.classes:
            raise ValueError(
                f"evals: train has classes={self.train.classes} and test {self.test.classes}; use one number"
            )

    def problems(self, stage: Any) -> list[str]:
        if "vision" in stage.experts and (stage.model is None or stage.model.encodes):
            return []
        return ["evals: Probe needs a stage that builds the vision expert; take it out of this one"]

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        (train, label, rows), (test, right, others) = (self._vectors(trained, each) for each in (self.train, self.test))
        near = nearest_vote(train, label, test, self.neighbours, self.train.classes)
        linear = linear_answers(train, label, test, self.train.classes, self.penalties)
        answers = {"k-NN": near, "linear": linear}
        if self.attentive:
            answers["attentive"] = attentive_answers(Rows(rows, label), others, self.train.classes, self.attentive)
        return {f"probe/{name}": 100 * (said == right).double().mean().item() for name, said in answers.items()}, {}

    def _vectors(self, trained: Trained, source: LabelledShards) -> tuple[Tensor, Tensor, Tensor]:
        """A source's vectors float32 [N, D], classes int64 [N], and rows bf16 [N, L, D] for the attentive probe (L is 0
        without one), on the host."""
        samples, vectors, labels = min(self.samples, trained.samples_of(source)), list[Tensor](), list[Tensor]()
        rows = list[Tensor]()
        task: Any = trained.task
        for batch in trained.batches({"images": source}, min(self.batch, samples), samples):
            images = task.encoder(batch).images
            patches = self.rows == "mean" and images.shape[1] > 1
            vectors.append((images[:, 1:].mean(1) if patches else images[:, 0]).float().cpu())
            labels.append(batch.extra[LABEL].cpu())
            if self.attentive:
                check_size(samples, *images.shape[1:])
                rows.append(images.bfloat16().cpu())
            else:
                rows.append(images[:, :0].cpu())
        return torch.cat(vectors)[:samples], torch.cat(labels)[:samples], torch.cat(rows)[:samples]


def nearest_vote(train: Tensor, label: Tensor, test: Tensor, neighbours: int, classes: int) -> Tensor:
    """int64 [M]: for each of `test` [M, D] the class for which its nearest `neighbours` of `train` [N, D] by cosine
    vote, each vote weighted by exp(cosine / 0.07) (DINO, arXiv 2104.14294, appendix F.1)."""
    train, answers = F.normalize(train, dim=-1), []
    for some in F.normalize(test, dim=-1).split(CHUNK):
        cosine, place = (some @ train.T).topk(min(neighbours, len(train)))
        votes = torch.zeros(len(some), classes).scatter_add_(1, label[place], (cosine / 0.07).exp())
        answers.append(votes.argmax(-1))
    return torch.cat(answers)


def linear_answers(
    train: Tensor, label: Tensor, test: Tensor, classes: int, penalties: tuple[float, ...] = (1e-3,)
) -> Tensor:
    """int64 [M]: the classes that multinomial logistic regression on `train` [N, D] predicts for `test` [M, D]. Vectors
    are standardised by the mean and deviation of `train`."""
    mean, deviation = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / deviation, (test - mean) / deviation
    penalty = penalties[0]
    if len(penalties) > 1:
        held = torch.arange(len(train)) % 5 == 0
        fits = [_fit(train[~held], label[~held], classes, each) for each in penalties]
        right = [((train[held] @ w + b).argmax(-1) == label[held]).sum().item() for w, b in fits]
        penalty = penalties[max(range(len(right)), key=right.__getitem__)]
    weight, bias = _fit(train, label, classes, penalty)
    return (test @ weight + bias).argmax(-1)


@torch.enable_grad()
def _fit(train: Tensor, label: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(train.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    search = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(train @ weight + bias, label) + penalty * weight.square().sum()
        value.backward()
        return value

    search.step(loss)
    return weight.detach(), bias.detach()
