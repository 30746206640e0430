"""Visual question answering on pairs with labels: a source that reads them, a head, an evaluation. One file outside
pretrain/."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Encoder, Evaluation, Objective
from pretrain.data.shards.reader import BadSample
from pretrain.data.sources import PairShards, Raw
from pretrain.evals.trained import missing_head
from pretrain.flops import Product
from pretrain.layers import PLAIN, Head


@dataclass(frozen=True)
class Questions(PairShards):
    """Pictures with a question each (txt) and the number of its answer (json)."""

    @property
    def wanted(self) -> tuple[str, ...]:
        return (*super().wanted, "json")

    def decode(self, members: Mapping, transform: Any, tokenizer: Any, rng: Any) -> Raw:
        raw = super().decode(members, transform, tokenizer, rng)
        try:
            answer = json.loads(members["json"])
            return raw._replace(extra={"label": int(answer["label"]), "answer": str(answer["answer"])})
        except (ValueError, KeyError, TypeError) as error:
            raise BadSample(f"its json holds no label and answer ({error!r})") from None


@dataclass(frozen=True)
class Answering(Objective):
    answers: int
    name = "answering"

    def build(self, model, experts, layers=PLAIN, tokens=None) -> nn.Module:
        return AnsweringHead(model.width("pair_images"), self.answers)

    def problems(self, stage: Any) -> list[str]:
        return [] if "pairs" in stage.mix else ["answering needs pairs in the mix; add them"]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        return [Product(layout.pairs, model.width("pair_images"), self.answers, classes=True)]


class AnsweringHead(nn.Module):
    def __init__(self, dim: int, answers: int):
        super().__init__()
        self.answer = Head(dim, answers)

    def needed_rows(self, batch: Batch) -> Kinds:
        rows = Kinds.rows_of(batch.layout, batch.images.device)
        rows.pair_images[:, :1] = True
        return rows

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder) -> dict[str, Tensor]:
        logits, label = self.answer(encoded.first.pair_images).float(), batch.extra["label"]
        assert len(batch.extra["answer"]) == len(label) == batch.layout.pairs
        accuracy = (logits.detach().argmax(-1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy/answers": accuracy}

    def after_step(self) -> None:
        """Nothing moves between steps."""


@dataclass(frozen=True)
class AnswerAccuracy(Evaluation):
    questions: Questions
    batch: int = 10

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "answering")

    @torch.no_grad()
    def run(self, trained: Any) -> tuple[dict[str, float], dict[str, list]]:
        head, right = trained.head("answering"), []
        for batch in trained.batches({"pairs": self.questions}, self.batch, trained.samples_of(self.questions)):
            logits = head.answer(trained.task.encoder(batch).first.pair_images)
            right.append(logits.argmax(-1) == batch.extra["label"])
        return {"vqa/accuracy": 100 * torch.cat(right).double().mean().item()}, {}
