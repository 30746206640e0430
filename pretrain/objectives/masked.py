"""Masked data modeling: one cross-entropy objective on images, texts and pairs (BEiT-3, arXiv 2208.10442, 2.2-2.3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Layout
from pretrain.data.masking import Masking
from pretrain.layers import PLAIN, Layers
from pretrain.models.multiway.config import MultiwayConfig


@dataclass(frozen=True)
class MaskedData(Masking):
    """Predict the visual tokenizer's codes of hidden patches and the ids of hidden words. The ratios are `Masking`'s:
    the loader hides, this scores. The weights of the terms are not published; here every sequence counts the same."""

    tied_text_head: bool = False  # its matrix is the text embedding's, as BERT's; the released BEiT-3 has its own
    name = "masked"

    def build(
        self,
        model: MultiwayConfig,
        experts: tuple[str, ...],
        layers: Layers = PLAIN,
        tokens: nn.Parameter | None = None,
    ) -> MaskedDataHeads:
        """`tokens` is the text embedding's table, for a tied text head."""
        ratios = {
            "image": self.image_ratio if "vision" in experts else 0,
            "pair_image": self.pair_image_ratio if "vision" in experts else 0,
            "pair_text": self.pair_text_ratio if "language" in experts else 0,
            "text": self.text_ratio if "language" in experts else 0,
        }
        parts = tuple(part for part, ratio in ratios.items() if ratio)
        heads = MaskedDataHeads(model, layers, parts=parts, tied_text_head=self.tied_text_head)
        if self.tied_text_head and heads.text is not None and tokens is not None:
            heads.text.weight = tokens
        return heads

    def head_rows(self, layout: Layout, model: MultiwayConfig) -> list[tuple[int, int]]:
        """(rows, outputs) of each head's product, about: for the count of FLOPs."""
        patches = max(layout.patches - 1, 0)
        image = (layout.images * self.image_ratio + layout.pairs * self.pair_image_ratio) * patches
        text = layout.text_rows * self.text_ratio + layout.pair_text_rows * self.pair_text_ratio
        return [(round(image), model.image_codes), (round(text), model.vocab_size)]


class MaskedDataHeads(nn.Module):
    """One linear head per vocabulary, run on masked rows only. `parts` are the kinds of rows that are hidden: image,
    pair_image, pair_text, text. A head without a part is not built: AdamW would move it all the same. A tied text head
    waits for its `weight`."""

    def __init__(
        self, model: MultiwayConfig, layers: Layers = PLAIN, *, parts: tuple[str, ...], tied_text_head: bool = False
    ):
        super().__init__()
        self.parts = parts
        image, text = {"image", "pair_image"} & set(parts), {"text", "pair_text"} & set(parts)
        self.image = layers.classifier(model.dim, model.image_codes) if image else None
        self.text = layers.classifier(model.dim, model.vocab_size, tied=tied_text_head) if text else None

    def forward(self, rows_TD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Rows [layout.rows, dim] -> `loss` (mean over sequences of the mean over a sequence's targets), `loss/PART`
        and `accuracy/PART`, where a part is image, pair_image, text or pair_text."""
        scores: dict[str, tuple[Tensor, Tensor, int]] = {}
        for head, parts in self._parts(rows_TD, batch):
            scores |= _score(head, parts)
        return _combine(scores)

    def needed_rows(self, batch: Batch) -> Tensor:
        """bool [layout.rows]: the hidden patches and words."""
        patches = F.pad(batch.image_masks, (1, 0)).flatten()[: batch.layout.vision_rows]
        return torch.cat([patches, batch.pair_masked.flatten(), batch.text_masked.flatten()])

    def guesses(self, rows_TD: Tensor, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{part: (guesses, targets)}, each [masked positions], in row order; for evaluation."""
        return {
            name: (head.guesses(rows.reshape(-1, rows.shape[-1])[masked.flatten()]), targets[masked])
            for head, parts in self._parts(rows_TD, batch)
            for name, (rows, masked, targets) in parts.items()
            if len(masked)
        }

    def _parts(self, rows_TD: Tensor, batch: Batch) -> list[tuple[Any, dict]]:
        """Per head that is built: {part: (rows, masked [n, L], targets [n, L])}."""
        layout = batch.layout
        found: list[tuple[Any, dict]] = []
        if self.image is not None:
            rows = rows_TD[: layout.vision_rows].unflatten(0, (-1, max(layout.patches, 1)))[:, 1:]
            codes = batch.image_codes
            if codes is None:
                assert not batch.image_masks.any(), "masked images need image_codes: run the visual tokenizer first"
                codes = torch.zeros_like(batch.image_masks, dtype=torch.long)
            split = [layout.images, layout.pairs]
            parts = zip(rows.split(split), batch.image_masks.split(split), codes.split(split), strict=True)
            found.append((self.image, dict(zip(("image", "pair_image"), parts, strict=True))))
        if self.text is not None:
            pair_rows, text_rows = rows_TD[layout.vision_rows :].split([layout.pair_text_rows, layout.text_rows])
            pairs = (pair_rows, batch.pair_masked, batch.pair_tokens)
            texts = (text_rows, batch.text_masked, batch.text_tokens)
            found.append((self.text, {"pair_text": pairs, "text": texts}))
        return [(head, {name: part for name, part in own.items() if name in self.parts}) for head, own in found]


def _score(head: nn.Module, parts: dict) -> dict[str, tuple[Tensor, Tensor, int]]:
    """{part: (rows, masked [n, L], targets [n, L])} -> {part: (loss, accuracy, sequences)}; one matrix product for all
    parts, on zero rows if nothing is masked (a head must run on every micro-step, or ZeRO mixes up gradients)."""
    rows = torch.cat([rows.reshape(-1, rows.shape[-1])[masked.flatten()] for rows, masked, _ in parts.values()])
    targets = torch.cat([targets[masked] for _, masked, targets in parts.values()])
    losses, right = head(rows, targets)
    found, start = {}, 0
    for name, (_, masked, _) in parts.items():
        per_sequence = masked.sum(-1)
        # A sequence's targets share its weight of one, so long and short sequences count the same.
        weight = (1 / per_sequence.clamp(min=1)).unsqueeze(-1).expand_as(masked)[masked]
        part = slice(start, start + len(weight))
        start += len(weight)
        count = max(masked.shape[0], 1)
        accuracy = right[part].sum() / max(len(weight), 1)
        found[name] = ((losses[part] * weight).sum() / count, accuracy, masked.shape[0])
    return found


def _combine(scores: dict[str, tuple[Tensor, Tensor, int]]) -> dict[str, Tensor]:
    total = max(sum(count for *_, count in scores.values()), 1)
    report = {"loss": torch.stack([loss * count for loss, _, count in scores.values()]).sum() / total}
    for name, (loss, accuracy, count) in scores.items():
        if count:
            report |= {f"loss/{name}": loss.detach(), f"accuracy/{name}": accuracy}
    return report
