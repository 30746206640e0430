"""Masked data modeling: one cross-entropy objective on images, texts and pairs (BEiT-3, arXiv 2208.10442, 2.2-2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Encoder, Objective
from pretrain.data.masking import Masking
from pretrain.flops import Product
from pretrain.layers import PLAIN, Layers


@dataclass(frozen=True)
class MaskedData(Masking, Objective):
    """Predict the visual tokenizer's codes of hidden patches and the ids of hidden words. The ratios are `Masking`'s:
    the loader hides, this scores. There are up to four terms: pictures and texts, alone and in pairs. Their weights are
    not published; here every sequence counts the same. What unilm's code does elsewhere (BEiT-2, VLMo: each term the
    mean of its targets, terms added) is mean_over="targets", terms="sum"."""

    tied_text_head: bool = False  # its matrix is the text embedding's, as BERT's; the released BEiT-3 has its own
    image_codes: int = 8192  # classes of the image head: the visual tokenizer's codes (BEiT v2, section 3.1)
    # What counts the same in a term. sequences: each is the mean of its targets, so that a word of a short caption
    # weighs more than one of a long text. targets: each hidden patch or word; how many a micro-batch has is random, so
    # other layouts of ranks and micro-batches, whose means differ, no longer give the same numbers.
    mean_over: str = "sequences"
    # mean: the terms' means weighted by what they were taken over, so that the loss is one mean. sum: they are added;
    # with four terms of equal size four times as much, to which optim.clip and optim.eps are not indifferent.
    terms: str = "mean"
    name = "masked"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_codes < 1:
            raise ValueError(f"image_codes={self.image_codes} is wrong; use the visual tokenizer's number of codes")
        for name, choices in (("mean_over", ("sequences", "targets")), ("terms", ("mean", "sum"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"masked.{name}={getattr(self, name)!r} is unknown; use {' or '.join(choices)}")

    @property
    def masking(self) -> Masking:
        return self

    def build(
        self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: nn.Parameter | None = None
    ) -> MaskedDataHeads:
        """`tokens` is the text embedding's table, for a tied text head."""
        ratios = {
            "image": self.image_ratio if "vision" in experts else 0,
            "pair_image": self.pair_image_ratio if "vision" in experts else 0,
            "pair_text": self.pair_text_ratio if "language" in experts else 0,
            "text": self.text_ratio if "language" in experts else 0,
        }
        parts = tuple(part for part, ratio in ratios.items() if ratio)
        image, text = {"image", "pair_image"} & set(parts), {"text", "pair_text"} & set(parts)
        tied = self.tied_text_head
        heads = MaskedDataHeads(
            parts,
            dual=self.dual,
            mean_over=self.mean_over,
            terms=self.terms,
            image=layers.classifier(model.width("images"), self.image_codes) if image else None,
            text=layers.classifier(model.width("texts"), model.vocab_size, tied=tied) if text else None,
        )
        if tied and heads.text is not None and tokens is not None:
            heads.text.weight = tokens
        return heads

    def problems(self, stage: Any) -> list[str]:
        if any(any(self.ratios(kind)) for kind in stage.mix):
            return []
        return [
            f"objectives: {self} hides nothing of the mix's {', '.join(sorted(stage.mix))}, so nothing could be "
            "learned; set the ratio of one of them above 0"
        ]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        """About: how many rows are hidden is random."""
        whole = 0 if self.dual else layout.dual
        images, texts = layout.images - whole, layout.texts - whole
        image = (images * self.image_ratio + layout.pairs * self.pair_image_ratio) * layout.patches
        text = texts * layout.text_len * self.text_ratio + layout.pair_text_rows * self.pair_text_ratio
        return [
            Product(round(image), model.width("images"), self.image_codes, classes=True),
            Product(round(text), model.width("texts"), model.vocab_size, classes=True),
        ]

    def splits(self, experts: Sequence[str]) -> dict[str, int]:
        built = "vision" in experts and (self.image_ratio or self.pair_image_ratio)
        return {"image_codes": self.image_codes} if built else {}


class Part(NamedTuple):
    """What one kind of sequences is asked: n sequences of L rows."""

    rows: Tensor  # [n, L, width]
    masked: Tensor  # bool [n, L]: where a target stands
    targets: Tensor  # int64 [n, L]


class MaskedDataHeads(nn.Module):
    """One linear head per vocabulary, run on masked rows only. `parts` are the kinds of rows that are hidden: image,
    pair_image, pair_text, text; of images and texts the dual pairs' count only if `dual`. A head without a part is not
    built: AdamW would move it all the same. A tied text head waits for its `weight`."""

    def __init__(
        self,
        parts: tuple[str, ...],
        *,
        dual: bool = True,
        mean_over: str = "sequences",
        terms: str = "mean",
        image: nn.Module | None,
        text: nn.Module | None,
    ):
        super().__init__()
        self.parts, self.dual, self.image, self.text = parts, dual, image, text
        self.mean_over, self.terms = mean_over, terms

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder | None = None) -> dict[str, Tensor]:
        """-> `loss` (as MaskedData's `mean_over` and `terms` say; by default the mean over sequences of the mean over a
        sequence's targets), `loss/PART` and `accuracy/PART`, where a part is image, pair_image, text or pair_text."""
        heads = self._heads(encoded, batch)
        weighed = {name: _weigh(part, self.mean_over) for _, parts in heads for name, part in parts.items()}
        whole = max(sum(over for _, over in weighed.values()), 1)
        report: dict[str, Tensor] = {}
        losses = []
        for head, parts in heads:
            # What each target's loss counts in the objective's.
            shares = {
                name: weighed[name][0] / (whole if self.terms == "mean" else max(weighed[name][1], 1)) for name in parts
            }
            loss, own = _score(head, parts, weighed, shares)
            losses.append(loss)
            report |= own
        return {"loss": torch.stack(losses).sum(), **report}

    def needed_rows(self, batch: Batch) -> Kinds:
        """The hidden patches and words."""
        layout = batch.layout
        masks = F.pad(batch.image_masks, (1, 0)) if layout.patches else batch.image_masks
        images, pair_images = masks.split([layout.images, layout.pairs])
        return Kinds(images, pair_images, batch.pair_masked, batch.text_masked)

    def predict(self, encoded: Kinds, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{part: (predictions, targets)}, each [masked positions], in row order; for evaluation."""
        return {
            name: (head.predict(part.rows.flatten(0, 1)[part.masked.flatten()]), part.targets[part.masked])
            for head, parts in self._heads(encoded, batch)
            for name, part in parts.items()
            if len(part.masked)
        }

    def after_step(self) -> None:
        """Nothing moves between steps."""

    def _heads(self, encoded: Kinds, batch: Batch) -> list[tuple[Any, dict[str, Part]]]:
        """Each head that is built, with the parts that it answers."""
        heads: list[tuple[Any, dict[str, Part]]] = []
        whole = 0 if self.dual else batch.layout.dual  # the last images and the first texts, of which nothing is hidden
        if self.image is not None:
            codes = batch.image_codes
            if codes is None:
                assert not batch.image_masks.any(), "masked images need image_codes: run the visual tokenizer first"
                codes = torch.zeros_like(batch.image_masks, dtype=torch.long)
            split = [batch.layout.images, batch.layout.pairs]
            masks, targets = batch.image_masks.split(split), codes.split(split)
            # The class row has no target.
            images, pair_images = (kind[:, 1:] for kind in (encoded.images, encoded.pair_images))
            alone = batch.layout.images - whole
            image = Part(images[:alone], masks[0][:alone], targets[0][:alone])
            heads.append((self.image, {"image": image, "pair_image": Part(pair_images, masks[1], targets[1])}))
        if self.text is not None:
            pairs = Part(encoded.pair_texts, batch.pair_masked, batch.pair_tokens)
            texts = Part(encoded.texts[whole:], batch.text_masked[whole:], batch.text_tokens[whole:])
            heads.append((self.text, {"pair_text": pairs, "text": texts}))
        return [(head, {name: part for name, part in own.items() if name in self.parts}) for head, own in heads]


def _weigh(part: Part, mean_over: str) -> tuple[Tensor, int]:
    """The weight of each target in its part's loss, fp32 [targets], and by what their sum is divided: sequences or
    targets."""
    # A sequence's targets share its weight of one, so long and short sequences count the same.
    weights = (1 / part.masked.sum(-1).clamp(min=1)).unsqueeze(-1).expand_as(part.masked)[part.masked]
    if mean_over == "targets":
        return torch.ones_like(weights), len(weights)
    return weights, len(part.masked)


def _score(
    head: nn.Module,
    parts: dict[str, Part],
    weighed: dict[str, tuple[Tensor, int]],
    shares: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The head's share of the loss, and what to report of its parts. One matrix product for all of them, on zero rows
    if nothing is masked: a head must run on every micro-step, or ZeRO mixes up gradients."""
    rows = torch.cat([part.rows.flatten(0, 1)[part.masked.flatten()] for part in parts.values()])
    targets = torch.cat([part.targets[part.masked] for part in parts.values()])
    scored = head(rows, targets, torch.cat([shares[name] for name in parts]))
    right = (scored.best == targets).float()
    report, start = {}, 0
    for name, part in parts.items():
        weights, over = weighed[name]
        own = slice(start, start + len(weights))
        start += len(weights)
        if len(part.masked):
            report[f"loss/{name}"] = (scored.losses[own] * weights).sum() / max(over, 1)
            report[f"accuracy/{name}"] = right[own].sum() / max(len(weights), 1)
    return scored.total, report
