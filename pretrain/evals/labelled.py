"""The accuracy of fine-tuned stages: classes of pictures, answers to questions, sentences about two pictures or one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pretrain.contracts import Evaluation
from pretrain.data.answers import accuracy
from pretrain.data.labelled import (
    ANSWERS,
    LABEL,
    LABEL_NAME,
    LabelledPairShards,
    LabelledShards,
    QuestionShards,
    TwoPictureShards,
    read_vocabulary,
)
from pretrain.evals.trained import Trained, check_counts, missing_head

EVERYTHING = 10**9


@dataclass(frozen=True)
class TopAccuracy(Evaluation):
    """Percent of pictures whose class has the highest logit, or one of the five highest."""

    images: LabelledShards
    samples: int = EVERYTHING
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "classification")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        head, ranks = trained.head("classification"), list[torch.Tensor]()
        samples = min(self.samples, trained.samples_of(self.images))
        for batch in trained.batches({"images": self.images}, min(self.batch, samples), samples):
            logits, label = head.logits(trained.task.encoder(batch)).float(), batch.extra[LABEL]
            own = logits.gather(1, label[:, None])
            # As in retrieval.first_right, a tie counts against us, and so does NaN.
            ranks.append((~(logits < own)).sum(-1).cpu() - 1 + ~own.isfinite().squeeze(1).cpu() * 10**6)
        rank = torch.cat(ranks)[:samples]
        top = {f"top-{k}": 100 * (rank < k).double().mean().item() for k in (1, 5)}
        return {f"classification/{name}": value for name, value in top.items()}, {}


@dataclass(frozen=True)
class QuestionAccuracy(Evaluation):
    """VQA's official accuracy of the most likely answer (data/answers.py), in percent."""

    questions: QuestionShards
    samples: int = EVERYTHING
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "answering")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        head, values = trained.head("answering"), list[float]()
        vocabulary = list(read_vocabulary(self.questions.vocabulary))
        samples = min(self.samples, trained.samples_of(self.questions))
        for batch in trained.batches({"pairs": self.questions}, min(self.batch, samples), samples):
            best = head.logits(trained.task.encoder(batch)).argmax(-1).tolist()
            values += [accuracy(vocabulary[i], given) for i, given in zip(best, batch.extra[ANSWERS], strict=True)]
        return {"answers/accuracy": 100 * sum(values[:samples]) / samples}, {}


@dataclass(frozen=True)
class TwoPictureAccuracy(Evaluation):
    """Percent of sentences that are judged right; chance is 50."""

    pairs: TwoPictureShards
    samples: int = EVERYTHING
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "reasoning")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        head, right = trained.head("reasoning"), list[torch.Tensor]()
        encoder, samples = trained.task.encoder, min(self.samples, trained.samples_of(self.pairs))
        for batch in trained.batches({"pairs": self.pairs}, min(self.batch, samples), samples):
            logits = head.logits(encoder(batch), batch, encoder)
            right.append((logits.argmax(-1) == batch.extra[LABEL]).cpu())
        return {"reasoning/accuracy": 100 * torch.cat(right)[:samples].double().mean().item()}, {}


@dataclass(frozen=True)
class EntailmentAccuracy(Evaluation):
    """Percent of sentences whose class is predicted right, among all and in each class (`.../accuracy/NAME`)."""

    pairs: LabelledPairShards
    samples: int = EVERYTHING
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "entailment")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        head, right, names = trained.head("entailment"), list[bool](), list[str]()
        samples = min(self.samples, trained.samples_of(self.pairs))
        for batch in trained.batches({"pairs": self.pairs}, min(self.batch, samples), samples):
            label = batch.extra[LABEL].cpu()
            right += (head.logits(trained.task.encoder(batch)).argmax(-1).cpu() == label).tolist()
            given = zip(batch.extra[LABEL_NAME], label.tolist(), strict=True)
            names += [name or str(number) for name, number in given]
        right, names = right[:samples], names[:samples]
        metrics = {"entailment/accuracy": 100 * sum(right) / samples}
        for name in sorted(set(names)):
            own = [hit for hit, each in zip(right, names, strict=True) if each == name]
            metrics[f"entailment/accuracy/{name}"] = 100 * sum(own) / len(own)
        return metrics, {}
