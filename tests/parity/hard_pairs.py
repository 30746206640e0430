"""An objective of the tests' own whose head asks for further passes through the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Encoder, Objective, Pass
from pretrain.layers import PLAIN, Layers

GROUP = 4  # neighbours among which a pair looks for a wrong text: on one rank however a step is cut
SHARPNESS = 4.0  # of the similarities, beside noise of about 1


@dataclass(frozen=True)
class HardPairs(Objective):
    """Predict the hidden words of each pair, and in a second pass those of a wrong text beside the same picture, drawn
    by the similarities of the first pass (the hard negatives of ALBEF, arXiv 2107.07651, 3.2). With `teacher` a third
    pass, without gradient, sees what is hidden, and what it predicts is a target too."""

    teacher: bool = False
    name = "hard_pairs"

    @property
    def draws(self) -> int:
        return GROUP

    def build(self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: Any = None) -> HardPairsHead:
        words = layers.classifier(model.width("pair_texts"), model.vocab_size)
        return HardPairsHead(words, teacher=self.teacher)

    def passes(self, layout: Layout) -> list[Pass]:
        return [Pass(layout), *[Pass(layout, backward=False)] * self.teacher]


class HardPairsHead(nn.Module):
    def __init__(self, words: Any, *, teacher: bool):
        super().__init__()
        self.words, self.teacher = words, teacher

    def needed_rows(self, batch: Batch) -> Kinds:
        rows = Kinds.rows_of(batch.layout, batch.images.device, first=True)
        return rows._replace(pair_texts=rows.pair_texts | batch.pair_masked)

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder) -> dict[str, Tensor]:
        """-> loss, and the smallest margin of `draw_wrong`."""
        wrong, margin = draw_wrong(encoded.first, batch.draws[HardPairs.name])
        texts = {name: getattr(batch, name)[wrong] for name in ("pair_tokens", "pair_inputs", "pair_masked")}
        changed = replace(batch, **texts)
        logits = self.words.logits(encoded.pair_texts).float()
        again = self.words.logits(encode(changed, self.needed_rows(changed)).pair_texts).float()
        losses = [_mean(logits, batch.pair_tokens, batch), _mean(again, changed.pair_tokens, changed)]
        if self.teacher:
            with torch.no_grad():
                clean = replace(batch, pair_inputs=batch.pair_tokens, image_masks=torch.zeros_like(batch.image_masks))
                target = self.words.logits(encode(clean, self.needed_rows(clean)).pair_texts).float().softmax(-1)
            losses.append(_mean(logits, target, batch))
        return {"loss": torch.stack(losses).mean(), "margin": margin}

    def after_step(self) -> None:
        """Nothing moves between steps."""


def _mean(logits: Tensor, targets: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of ids [n, L] or probabilities [n, L, V]: over pairs the mean of a pair's hidden words."""
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="none").view_as(batch.pair_masked)
    masked = batch.pair_masked
    return (losses.where(masked, 0).sum(1) / masked.sum(1).clamp(min=1)).mean()


@torch.no_grad()
def draw_wrong(first: Kinds, draws: Tensor) -> tuple[Tensor, Tensor]:
    """For each pair the place of another one of its group, drawn by how near its text is (the Gumbel trick), and the
    smallest margin of these choices."""
    both = (first.pair_images, first.pair_texts)
    images, texts = (F.normalize(rows.float(), dim=-1).unflatten(0, (-1, GROUP)) for rows in both)
    scores = SHARPNESS * images @ texts.mT - (-draws.log()).log().unflatten(0, (-1, GROUP))
    scores += torch.zeros(GROUP, GROUP).fill_diagonal_(-torch.inf)
    best, places = scores.topk(2)
    groups = GROUP * torch.arange(len(scores)).unsqueeze(1)
    return (groups + places[..., 0]).flatten(), (best[..., 0] - best[..., 1]).min()
