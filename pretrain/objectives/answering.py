"""Answers to questions about a picture, as BEiT-3 is fine-tuned for VQAv2 (arXiv 2208.10442, 3.1.1; unilm
beit3/modeling_finetune.py, BEiT3ForVisualQuestionAnswering): multi-label classification over the most frequent answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Encoder, Objective
from pretrain.data.labelled import SCORES
from pretrain.flops import Product
from pretrain.layers import HEAD_STD, PLAIN, Layers, Linear
from pretrain.objectives.classification import first_rows, two_layers


@dataclass(frozen=True)
class Answering(Objective):
    """For pictures and questions of the mix's `pairs`, from QuestionShards. `answers`: the size of their vocabulary."""

    answers: int = 3129  # those that people gave at least nine times in VQAv2 (unilm beit3/datasets.py)
    name = "answering"

    def __post_init__(self) -> None:
        if self.answers < 2:
            raise ValueError(f"answering.answers={self.answers} is below 2; use the length of the vocabulary")

    def build(self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: Any = None) -> nn.Module:
        return AnsweringHead(model.width("pair_images"), self.answers)

    def problems(self, stage: Any) -> list[str]:
        if not hasattr(stage.mix.get("pairs"), "vocabulary"):
            return ["answering needs questions with answers; give the mix pairs=QuestionShards(...)"]
        return []

    def products(self, layout: Layout, model: Any) -> list[Product]:
        width = model.width("pair_images")
        sizes = ((width, width), (width, 2 * width), (2 * width, self.answers))
        return [Product(layout.pairs, inputs, outputs) for inputs, outputs in sizes]


class AnsweringHead(nn.Module):
    """A pooler on the picture's class row, and two layers."""

    def __init__(self, width: int, answers: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.pool = Linear(width, width, std=HEAD_STD, cut=math.inf)
        self.answer = two_layers(width, 2 * width, answers)

    def needed_rows(self, batch: Batch) -> Kinds:
        return first_rows(batch)

    def logits(self, encoded: Kinds) -> Tensor:
        """-> [pairs, answers]"""
        return self.answer(self.pool(self.norm(encoded.first.pair_images)).tanh())

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder | None = None) -> dict[str, Tensor]:
        """-> `loss`, the binary cross-entropy summed over the answers, and `accuracy/answers`, the mean VQA score of
        the most likely answers. ValueError if the vocabulary has another length."""
        logits, targets = self.logits(encoded).float(), batch.extra[SCORES]
        if targets.shape != logits.shape:
            raise ValueError(
                f"answering.answers={logits.shape[1]} but the vocabulary of mix.pairs has {targets.shape[1]}; use one "
                "number"
            )
        score = targets.gather(1, logits.detach().argmax(-1, keepdim=True)).mean()
        loss = F.binary_cross_entropy_with_logits(logits, targets) * targets.shape[1]
        return {"loss": loss, "accuracy/answers": score}

    def after_step(self) -> None:
        """Nothing moves between steps."""
