"""Image-text matching with hard negatives (ALBEF, arXiv 2107.07651, 3.2) on the contrast's dual pairs: the first pass
says which wrong partner is the most alike, a second one fuses. One file outside pretrain/."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout, make_batch
from pretrain.contracts import Encoder, Evaluation, Objective, Pass
from pretrain.evals.trained import missing_head
from pretrain.flops import Product
from pretrain.layers import PLAIN, Head


@dataclass(frozen=True)
class Matching(Objective):
    name = "matching"

    @property
    def draws(self) -> int:
        return 1  # a picture's negative text, a text's negative picture

    def build(self, model, experts, layers=PLAIN, tokens=None) -> nn.Module:
        return MatchingHead(model.width("pair_images"))

    def problems(self, stage: Any) -> list[str]:
        return [] if "dual" in stage.mix else ["matching needs dual in the mix; add it"]

    def passes(self, layout: Layout) -> list[Pass]:
        return [Pass(fused(layout))]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        return [Product(3 * layout.dual, model.width("pair_images"), 2, classes=True)]


def fused(layout: Layout) -> Layout:
    """Each pair, its picture with a wrong text, its text with a wrong picture."""
    return Layout(pairs=3 * layout.dual, patches=layout.patches, pair_len=layout.text_len)


class MatchingHead(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.match = Head(dim, 2)

    def needed_rows(self, batch: Batch) -> Kinds:
        return Kinds.rows_of(batch.layout, batch.images.device, first=True)

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder) -> dict[str, Tensor]:
        layout, count = batch.layout, batch.layout.dual
        images, texts = batch.images[layout.images - count : layout.images], batch.text_tokens[:count]
        wrong_text, wrong_image = self.negatives(encoded, batch)
        pairs = make_batch(
            fused(layout),
            images=torch.cat([images, images, images[wrong_image]]),
            pair_tokens=torch.cat([texts, texts[wrong_text], texts]),
        )
        rows = encode(pairs, needed=Kinds.rows_of(pairs.layout, images.device, first=True))
        logits = self.match(rows.first.pair_images).float()
        label = (torch.arange(3 * count, device=images.device) < count).long()
        accuracy = (logits.detach().argmax(-1) == label).float().mean()
        return {"loss": F.cross_entropy(logits, label), "accuracy/matching": accuracy}

    @torch.no_grad()
    def negatives(self, encoded: Kinds, batch: Batch) -> tuple[Tensor, Tensor]:
        """For each picture a wrong text and for each text a wrong picture, drawn in proportion to their likeness."""
        layout, count = batch.layout, batch.layout.dual
        image = F.normalize(encoded.first.images[layout.images - count :].float(), dim=-1)
        text = F.normalize(encoded.first.texts[:count].float(), dim=-1)
        alike = ((image @ text.T) / 0.07).exp().fill_diagonal_(0)
        draws = batch.draws["matching"][:, 0].split([layout.images, layout.pairs, layout.texts])
        picture_draws, text_draws = draws[0][layout.images - count :], draws[2][:count]
        return _draw(alike, picture_draws), _draw(alike.T, text_draws)

    def after_step(self) -> None:
        """Nothing moves between steps."""


def _draw(weights: Tensor, uniform: Tensor) -> Tensor:
    """For each row the first column at which the running sum of its weights passes its draw."""
    total = weights.cumsum(-1)
    return (total < uniform.unsqueeze(-1) * total[:, -1:]).sum(-1).clamp(max=weights.shape[1] - 1)


@dataclass(frozen=True)
class MatchingAccuracy(Evaluation):
    pairs: Any
    batch: int = 8

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "matching")

    @torch.no_grad()
    def run(self, trained: Any) -> tuple[dict[str, float], dict[str, list]]:
        head, accuracies = trained.head("matching"), []
        for batch in trained.batches({"dual": self.pairs}, self.batch, 2 * self.batch):
            report = head(trained.task.encoder(batch), batch, trained.task.encoder)
            accuracies.append(report["accuracy/matching"].item())
        return {"matching/percent": 100 * sum(accuracies) / len(accuracies)}, {}
