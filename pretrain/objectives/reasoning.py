"""Is a sentence true of two pictures? As BEiT-3 is fine-tuned for NLVR2 (arXiv 2208.10442, 3.1.2; unilm
beit3/modeling_finetune.py, BEiT3ForVisualReasoning): the sentence is fused with each picture, and a head reads the
first rows of both pictures and both copies of the sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.batch import DROP_PATH, Batch, Kinds, Layout, derived, make_batch
from pretrain.contracts import Encoder, Objective, Pass
from pretrain.data.labelled import LABEL, SECOND
from pretrain.flops import Product
from pretrain.layers import PLAIN, Layers
from pretrain.objectives.classification import answered, first_rows, label_problems, two_layers


@dataclass(frozen=True)
class Reasoning(Objective):
    """For pictures and sentences of the mix's `pairs`, from TwoPictureShards; the second picture needs a further pass.
    `scale` multiplies the head's initial weights. unilm's 0.001 needs its long warm-up: in a few hundred steps a small
    model learns nothing with it (benchmarks/README.md), because the norm behind weights so small hides their changes.
    """

    scale: float = 0.001
    name = "reasoning"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ValueError(f"reasoning.scale={self.scale} must be above 0; use unilm's 0.001, or 1")

    def build(self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: Any = None) -> nn.Module:
        return ReasoningHead(model.width("pair_images"), model.width("pair_texts"), self.scale)

    def problems(self, stage: Any) -> list[str]:
        source = stage.mix.get("pairs")
        if getattr(source, "pictures", 1) != 2:
            return ["reasoning needs sentences about two pictures; give the mix pairs=TwoPictureShards(...)"]
        return label_problems(stage, "pairs", self.name)

    def passes(self, layout: Layout) -> list[Pass]:
        return [Pass(second_layout(layout))]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        width = 2 * (model.width("pair_images") + model.width("pair_texts"))
        return [Product(layout.pairs, width, width // 2), Product(layout.pairs, width // 2, 2)]


def second_layout(layout: Layout) -> Layout:
    """The layout of the pass over the pairs with their second pictures."""
    return Layout(pairs=layout.pairs, patches=layout.patches, pair_len=layout.pair_len)


class ReasoningHead(nn.Module):
    """A norm and two layers on the four first rows."""

    def __init__(self, images: int, texts: int, scale: float):
        super().__init__()
        width = 2 * (images + texts)
        self.norm = nn.LayerNorm(width)
        self.judge = two_layers(width, width // 2, 2, scale=scale)

    def needed_rows(self, batch: Batch) -> Kinds:
        return first_rows(batch, texts=True)

    def logits(self, encoded: Kinds, batch: Batch, encode: Encoder) -> Tensor:
        """-> [pairs, 2]: not true, true. `encoded`: the pairs with their first pictures."""
        other = derived(batch, _second)
        second = encode(other, needed=first_rows(other.on_host, texts=True))
        both = [row for kinds in (encoded, second) for row in (kinds.first.pair_images, kinds.first.pair_texts)]
        return self.judge(self.norm(torch.cat(both, -1)))

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder) -> dict[str, Tensor]:
        return answered(self.logits(encoded, batch, encode), batch.extra[LABEL], Reasoning.name)

    def after_step(self) -> None:
        """Nothing moves between steps."""


def _second(batch: Batch) -> Batch:
    """The pairs with their second pictures."""
    layout = batch.layout
    draws = {}
    if (drawn := batch.draws.get(DROP_PATH)) is not None:
        draws[DROP_PATH] = drawn[layout.images : layout.images + layout.pairs]
    return make_batch(second_layout(layout), images=batch.extra[SECOND], pair_tokens=batch.pair_tokens, draws=draws)
