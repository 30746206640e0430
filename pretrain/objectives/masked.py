"""Masked data modeling: one cross-entropy objective on images, texts and pairs (BEiT-3, arXiv 2208.10442, 2.2-2.3)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Encoder, Objective
from pretrain.data.masking import Masking
from pretrain.flops import Product
from pretrain.layers import HEAD_STD, PLAIN, Layers, Linear
from pretrain.rows import take


@dataclass(frozen=True)
class MaskedData(Masking, Objective):
    """Predict the visual tokenizer's codes of hidden patches and the ids of hidden words. The fields of `Masking` say
    what the loader hides. There are up to four terms: pictures and texts, alone and in pairs. BEiT-3's weights of the
    terms are not published; here every sequence counts the same. unilm's code for BEiT-2 and VLMo, where each term is
    the mean over its targets and the terms are added, is mean_over="targets", terms="sum"."""

    tied_text_head: bool = False  # the head's matrix is the text embedding's, as in BERT; the released BEiT-3 unties it
    image_codes: int = 8192  # classes of the image head: the visual tokenizer's codes (BEiT v2, section 3.1)
    # What has equal weight in a term. sequences: each sequence, with the mean over its targets, so that a word of a
    # short caption weighs more than one of a long text. targets: each hidden patch or word. Their number in a
    # micro-batch is random, so that another number of ranks or micro-batches no longer gives the same loss.
    mean_over: str = "sequences"
    # mean: one mean over the sequences (or targets) of all terms. sum: the terms' means are added, which with four of
    # them makes gradients four times as large; optim.clip and optim.eps notice that.
    terms: str = "mean"
    # A linear layer, gelu and a norm before the classifier, as in the heads of BERT, ALBEF, VLMo and ViLT.
    transform: bool = False
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
        parts = self._parts(experts)
        image, text = {"image", "pair_image"} & set(parts), {"text", "pair_text"} & set(parts)
        tied, width = self.tied_text_head, model.width("texts")
        transform = transform_rows(width, getattr(model, "init_std", HEAD_STD)) if text and self.transform else None
        heads = MaskedDataHeads(
            parts,
            dual=self.dual,
            mean_over=self.mean_over,
            terms=self.terms,
            image=layers.classifier(model.width("images"), self.image_codes) if image else None,
            text=layers.classifier(width, model.vocab_size, tied=tied) if text else None,
            transform=transform,
        )
        if tied and heads.text is not None and tokens is not None:
            heads.text.weight = tokens
        return heads

    def _parts(self, experts: Sequence[str]) -> tuple[str, ...]:
        """The terms that a model with these experts has: those of whose rows some are hidden."""
        vision, language = "vision" in experts, "language" in experts
        ratios = {
            "image": vision and self.image_ratio,
            "pair_image": vision and self.pair_image_ratio,
            "pair_text": language and self.pair_text_ratio,
            "text": language and self.text_ratio,
        }
        return tuple(part for part, ratio in ratios.items() if ratio)

    def problems(self, stage: Any) -> list[str]:
        if not any(any(self.ratios(kind)) for kind in stage.mix):
            return [
                f"objectives: {self} hides nothing of the mix's {', '.join(sorted(stage.mix))}, so nothing could be "
                "learned; set the ratio of one of them above 0"
            ]
        if not self._parts(stage.experts):
            return [
                f"objectives: {self} hides nothing that experts={tuple(stage.experts)} read; give the stage the expert "
                "vision or language"
            ]
        return []

    def products(self, layout: Layout, model: Any) -> list[Product]:
        """The expected ones: how many rows are hidden is random."""
        whole = 0 if self.dual else layout.dual
        images, texts = layout.images - whole, layout.texts - whole
        image = (images * self.image_ratio + layout.pairs * self.pair_image_ratio) * layout.patches
        text = round(texts * layout.text_len * self.text_ratio + layout.pair_text_rows * self.pair_text_ratio)
        width = model.width("texts")
        return [
            Product(round(image), model.width("images"), self.image_codes, classes=True),
            *([Product(text, width, width)] if self.transform else []),
            Product(text, width, model.vocab_size, classes=True),
        ]

    def splits(self, experts: Sequence[str]) -> dict[str, int]:
        built = "vision" in experts and (self.image_ratio or self.pair_image_ratio)
        return {"image_codes": self.image_codes} if built else {}


def transform_rows(width: int, std: float) -> nn.Sequential:
    """The layers before BERT's classifier (transformers' BertPredictionHeadTransform; its norm's eps is 1e-12)."""
    return nn.Sequential(Linear(width, width, std=std, cut=math.inf), nn.GELU(), nn.LayerNorm(width, eps=1e-12))


class WordHead:
    """A layers.Classifier over the vocabulary with the `transform` of its rows, if any, before it; its calls are those
    of a layers.Classifier."""

    def __init__(self, words: Any, transform: nn.Module | None):
        self.words, self.transform = words, transform

    def __call__(self, rows: Tensor, *rest: Any, **options: Any) -> Any:
        return self.words(self._rows(rows), *rest, **options)

    def logits(self, rows: Tensor) -> Tensor:
        return self.words.logits(self._rows(rows))

    def predict(self, rows: Tensor) -> Tensor:
        return self.words.predict(self._rows(rows))

    def _rows(self, rows: Tensor) -> Tensor:
        return rows if self.transform is None else self.transform(rows)


class Part(NamedTuple):
    """One term of the loss: the rows of one kind, n sequences of L rows, and their targets."""

    rows: Tensor  # [n, L, width]
    places: Tensor  # int64 [targets]: where a target stands among the n * L rows, rising
    targets: Tensor  # int64 [targets]
    per_sequence: Tensor  # int64 [n]: how many targets each sequence has
    sequences: int  # how many sequences may have a target; the mean over sequences divides by it


class MaskedDataHeads(nn.Module):
    """One linear head for codes and one for words, run on masked rows only. `parts` are the terms of the loss: image,
    pair_image, pair_text, text; rows of dual pairs count among images and texts only if `dual`. A head without a term
    is not built: AdamW would move it all the same. The builder of a tied text head sets its `weight`."""

    def __init__(
        self,
        parts: tuple[str, ...],
        *,
        dual: bool = True,
        mean_over: str = "sequences",
        terms: str = "mean",
        image: nn.Module | None,
        text: nn.Module | None,
        transform: nn.Module | None = None,
    ):
        super().__init__()
        self.parts, self.dual, self.image, self.text, self.transform = parts, dual, image, text, transform
        self.mean_over, self.terms = mean_over, terms

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder | None = None) -> dict[str, Tensor]:
        """-> `loss` (as MaskedData's `mean_over` and `terms` say; by default the mean over sequences of the mean over a
        sequence's targets), `loss/PART` and `accuracy/PART`, where a part is image, pair_image, text or pair_text."""
        heads = self._heads(encoded, batch)
        weighed = {name: weigh(part, self.mean_over) for _, parts in heads for name, part in parts.items()}
        whole = max(sum(over for _, over in weighed.values()), 1)
        report: dict[str, Tensor] = {}
        losses = []
        for head, parts in heads:
            # The weight of each target in the objective's loss.
            shares = {
                name: weighed[name][0] / (whole if self.terms == "mean" else max(weighed[name][1], 1)) for name in parts
            }
            loss, own = score(head, parts, weighed, shares)
            losses.append(loss)
            report |= own
        return {"loss": torch.stack(losses).sum(), **report}

    def needed_rows(self, batch: Batch) -> Kinds:
        """The hidden patches and words."""
        return batch.hidden

    def predict(self, encoded: Kinds, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """{part: (predictions, targets)}, each [masked positions], in row order; for evaluation."""
        return {
            name: (head.predict(take(part.rows.flatten(0, 1), part.places)), part.targets)
            for head, parts in self._heads(encoded, batch)
            for name, part in parts.items()
            if part.sequences
        }

    @property
    def words(self) -> WordHead | None:
        """The head that predicts words from rows [..., width]; None for a stage that hides none."""
        return None if self.text is None else WordHead(self.text, self.transform)

    def after_step(self) -> None:
        """Nothing moves between steps."""

    def _heads(self, encoded: Kinds, batch: Batch) -> list[tuple[Any, dict[str, Part]]]:
        """Each head that is built, with its parts by their names."""
        batch = batch.indexed()
        layout, hidden = batch.layout, batch.hidden
        whole = 0 if self.dual else layout.dual  # the last images and the first texts, of which nothing is hidden
        counts = layout.images - whole, layout.pairs, layout.pairs, layout.texts - whole
        targets = self._image_codes(batch).split([layout.images, layout.pairs])
        tokens = (*targets, batch.pair_tokens, batch.text_tokens)
        parts = [
            Part(rows, places, own.flatten().index_select(0, places), masked.sum(-1), count)
            for rows, masked, places, own, count in zip(
                encoded, hidden, self._places(batch), tokens, counts, strict=True
            )
        ]
        by_name = dict(zip(("image", "pair_image", "pair_text", "text"), parts, strict=True))
        own = [(self.image, ("image", "pair_image")), (self.words, ("pair_text", "text"))]
        return [
            (head, {name: by_name[name] for name in names if name in self.parts})
            for head, names in own
            if head is not None
        ]

    def _places(self, batch: Batch) -> list[Tensor]:
        """The places of the targets among the rows of each kind, int64 [targets] each; without those of dual pairs
        unless `dual`."""
        index = batch.index
        assert index is not None
        images, dual_images, pair_images, pair_texts, dual_texts, texts = index.hidden.split(list(index.hidden_counts))
        if self.dual:
            images, texts = torch.cat([images, dual_images]), torch.cat([dual_texts, texts])
        starts = itertools.accumulate(batch.layout.counts, initial=0)
        return [own - start for own, start in zip((images, pair_images, pair_texts, texts), starts, strict=False)]

    def _image_codes(self, batch: Batch) -> Tensor:
        """int64 [N, image_len]: the codes, with a 0 in the place of the class row, which has no target."""
        codes = batch.image_codes
        if codes is None:
            assert self.image is None or batch.index is None or not any(batch.index.hidden_counts[:3]), (
                "masked images need image_codes: run the visual tokenizer first"
            )
            codes = torch.zeros_like(batch.image_masks, dtype=torch.long)
        return F.pad(codes, (1, 0)) if batch.layout.patches else codes


def weigh(part: Part, mean_over: str) -> tuple[Tensor, int]:
    """The weight of each target in its part's loss, fp32 [targets], and the number by which the weighted sum is
    divided: of sequences, or of targets."""
    # A sequence's targets share its weight of one, so long and short sequences count the same.
    weights = (1 / part.per_sequence.clamp(min=1)).index_select(0, part.places // max(part.rows.shape[1], 1))
    if mean_over == "targets":
        return torch.ones_like(weights), len(weights)
    return weights, part.sequences


def score(
    head: Callable[..., Any],
    parts: dict[str, Part],
    weighed: dict[str, tuple[Tensor, int]],
    shares: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The head's share of the objective's loss, and `loss/PART` and `accuracy/PART`. `weighed`: for each part what
    `weigh` returns; `shares`: the weight of each target in the objective's loss. There is one matrix product for all
    parts, on zero rows if nothing is masked: a head must run on every micro-step, or ZeRO mixes up gradients."""
    rows = torch.cat([take(part.rows.flatten(0, 1), part.places) for part in parts.values()])
    targets = torch.cat([part.targets for part in parts.values()])
    scored = head(rows, targets, torch.cat([shares[name] for name in parts]))
    right = (scored.best == targets).float()
    report, start = {}, 0
    for name, part in parts.items():
        weights, over = weighed[name]
        own = slice(start, start + len(weights))
        start += len(weights)
        if part.sequences:
            report[f"loss/{name}"] = (scored.losses[own] * weights).sum() / max(over, 1)
            report[f"accuracy/{name}"] = right[own].sum() / max(len(weights), 1)
    return scored.total, report
