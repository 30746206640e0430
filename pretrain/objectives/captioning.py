"""Language modelling of a pair's text behind its picture: each word is predicted from the picture and the words before.

BLIP (arXiv 2201.12086, 3.2) adds it to contrast and matching with equal weights, and smooths its targets by 0.1; CoCa
(arXiv 2205.01917, 3.2) gives it twice the weight of its contrast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import DROP_PATH, PAD, Batch, Kinds, Layout, derived, make_batch
from pretrain.contracts import Encoder, Objective, Pass
from pretrain.flops import Product
from pretrain.layers import HEAD_STD, PLAIN, Layers
from pretrain.objectives.masked import Part, WordHead, score, transform_rows, weigh
from pretrain.rows import sent


@dataclass(frozen=True)
class Captioning(Objective):
    """Predict each word and EOS of the texts of pairs, and of dual pairs, which are fused for it. No patch is hidden
    and the picture sees only itself; a word sees the picture and the words before it. It reads a causal pass of its
    own, over clean words."""

    smoothing: float = 0.0  # share of each target that is spread evenly over the vocabulary
    mean_over: str = "sequences"  # or "targets"; as MaskedData's
    tied_text_head: bool = False  # the head's matrix is the text embedding's, as MaskedData's
    # A linear layer, gelu and a norm before the classifier, as in the heads of BERT and of BLIP's decoder.
    transform: bool = False
    name = "captioning"
    first_pass = False

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise ValueError(
                f"captioning.smoothing={self.smoothing} is not a share; use at least 0 and less than 1, "
                "such as BLIP's 0.1"
            )
        if self.mean_over not in ("sequences", "targets"):
            raise ValueError(f"captioning.mean_over={self.mean_over!r} is unknown; use sequences or targets")

    def build(
        self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: nn.Parameter | None = None
    ) -> CaptioningHead:
        """`tokens` is the text embedding's table, for a tied head."""
        width = model.width("pair_texts")
        words = layers.classifier(width, model.vocab_size, tied=self.tied_text_head)
        if self.tied_text_head and tokens is not None:
            words.weight = tokens
        transform = transform_rows(width, getattr(model, "init_std", HEAD_STD)) if self.transform else None
        return CaptioningHead(words, transform, smoothing=self.smoothing, mean_over=self.mean_over)

    def problems(self, stage: Any) -> list[str]:
        problems = []
        if not {"pairs", "dual"} & set(stage.mix):
            problems.append(f"captioning needs pairs or dual in the mix (mix={sorted(stage.mix)}); add one of them")
        if missing := [name for name in ("vision", "language") if name not in stage.experts]:
            problems.append(
                f"captioning reads pictures and texts, and experts={list(stage.experts)} lacks {' and '.join(missing)}"
                "; add what is missing"
            )
        return problems

    def passes(self, layout: Layout) -> list[Pass]:
        own = caption_layout(layout)
        return [Pass(own, again=own.pairs if layout.dual == own.pairs else 0)]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        """An upper bound: the last row of a text has no target, and how much is padding depends on the texts."""
        rows, width = caption_layout(layout).pair_text_rows, model.width("pair_texts")
        transform = [Product(rows, width, width)] if self.transform else []
        return [*transform, Product(rows, width, model.vocab_size, classes=True)]


def caption_layout(layout: Layout) -> Layout:
    """The layout of the causal pass over a batch's pairs and dual pairs."""
    length = max(layout.pair_len if layout.pairs else 0, layout.text_len if layout.dual else 0)
    return Layout(pairs=layout.pairs + layout.dual, patches=layout.patches, pair_len=length, causal=True)


class CaptioningHead(nn.Module):
    """A linear head over the vocabulary, on the rows of a pass of its own."""

    def __init__(
        self,
        words: Any,
        transform: nn.Module | None = None,
        *,
        smoothing: float = 0.0,
        mean_over: str = "sequences",
    ):
        super().__init__()
        self.words, self.transform, self.smoothing, self.mean_over = words, transform, smoothing, mean_over

    def needed_rows(self, batch: Batch) -> Kinds:
        """No row of the first pass."""
        return Kinds.rows_of(batch.layout, batch.images.device)

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder) -> dict[str, Tensor]:
        """-> `loss`, the mean over sequences of the mean over a text's words (or as `mean_over` says), the same as
        `loss/caption`, and `accuracy/caption` over all words."""
        captions = caption_batch(batch)
        host = captions.on_host
        asked = has_next(host.pair_tokens)
        needed = Kinds.rows_of(host.layout, host.images.device)._replace(pair_texts=asked)
        rows = encode(captions, needed=needed).pair_texts
        places = sent(asked.flatten().nonzero().squeeze(1), captions.images.device)
        part = Part(
            rows=rows,
            places=places,
            targets=following(captions.pair_tokens).flatten().index_select(0, places),
            per_sequence=has_next(captions.pair_tokens).sum(-1),
            sequences=captions.layout.pairs,
        )
        weights, over = weigh(part, self.mean_over)
        own = {"caption": part}, {"caption": (weights, over)}, {"caption": weights / max(over, 1)}
        loss, report = score(self._scored, *own)
        return {"loss": loss, **report}

    def logits(self, rows: Tensor) -> Tensor:
        """[..., width] -> [..., vocab_size]: for the word that follows each row."""
        return WordHead(self.words, self.transform).logits(rows)

    def _scored(self, rows: Tensor, *rest: Tensor) -> Any:
        return WordHead(self.words, self.transform)(rows, *rest, smoothing=self.smoothing)

    def after_step(self) -> None:
        """Nothing moves between steps."""


def following(tokens: Tensor) -> Tensor:
    """int64 [n, L] -> [n, L]: at each place the next word, and PAD at the last."""
    return F.pad(tokens[:, 1:], (0, 1), value=PAD)


def has_next(tokens: Tensor) -> Tensor:
    """int64 [n, L] -> bool [n, L]: the rows that predict a word."""
    return (tokens != PAD) & (following(tokens) != PAD)


def caption_batch(batch: Batch) -> Batch:
    """The pass of `caption_layout`: whole pictures and clean words, with an index that waits for no device."""
    return derived(batch, _captions)


def _captions(batch: Batch) -> Batch:
    layout, own = batch.layout, caption_layout(batch.layout)
    pictures = slice(layout.images, None), slice(layout.images - layout.dual, layout.images)
    texts = batch.pair_tokens, batch.text_tokens[: layout.dual]
    widened = [F.pad(ids, (0, own.pair_len - ids.shape[1]), value=PAD) for ids in texts if len(ids)]
    draws = {}
    if (drawn := batch.draws.get(DROP_PATH)) is not None:
        # A dual pair has two sets of numbers; the fused pair uses its picture's.
        draws[DROP_PATH] = torch.cat([drawn[layout.images : layout.images + layout.pairs], drawn[pictures[1]]])
    dual = torch.arange(layout.images, device=batch.images.device)[pictures[1]]
    return make_batch(
        own,
        images=torch.cat([batch.images[part] for part in pictures]),
        again=None if layout.pairs else dual,
        pair_tokens=torch.cat(widened) if widened else None,
        draws=draws,
    )
