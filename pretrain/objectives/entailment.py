"""Does a picture entail a sentence, contradict it, or leave it open (SNLI-VE)? A choice among three classes, as UNITER
and ALBEF (arXiv 2107.07651, 5; models/model_ve.py) put it, by the head that BEiT-3 has for questions. BEiT-3 published
no settings for this task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Encoder, Objective
from pretrain.data.labelled import LABEL
from pretrain.flops import Product
from pretrain.layers import PLAIN, Layers
from pretrain.objectives.answering import Answering, AnsweringHead
from pretrain.objectives.classification import answered, label_problems


@dataclass(frozen=True)
class Entailment(Objective):
    """For pictures and sentences of the mix's `pairs`, from LabelledPairShards with as many `classes`."""

    classes: int = 3
    name = "entailment"

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"entailment.classes={self.classes} is below 2; use the number of labels.json, such as 3")

    def build(self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: Any = None) -> nn.Module:
        return EntailmentHead(model.width("pair_images"), self.classes)

    def problems(self, stage: Any) -> list[str]:
        there = getattr(stage.mix.get("pairs"), "classes", None)
        if there is None:
            return ["entailment needs sentences with labels; give the mix pairs=LabelledPairShards(...)"]
        if there != self.classes:
            return [f"entailment.classes={self.classes} but mix.pairs.classes={there}; use one number"]
        return label_problems(stage, "pairs", self.name)

    def products(self, layout: Layout, model: Any) -> list[Product]:
        return Answering(self.classes).products(layout, model)


class EntailmentHead(AnsweringHead):
    """The layers of AnsweringHead, with a softmax over classes of which exactly one is right."""

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder | None = None) -> dict[str, Tensor]:
        return answered(self.logits(encoded), batch.extra[LABEL], Entailment.name)
