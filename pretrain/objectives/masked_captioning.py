"""BEiT-3's fine-tuning for captions (arXiv 2208.10442, 3.1.3; unilm beit3/modeling_finetune.py, BEiT3ForCaptioning):
predict hidden words of a text, each from the picture and the words before it; the picture sees only itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from pretrain.batch import DROP_PATH, Batch, Kinds, Layout, derived, make_batch
from pretrain.contracts import Encoder, Objective, Pass
from pretrain.data.masking import Masking
from pretrain.flops import Product
from pretrain.layers import PLAIN, Layers
from pretrain.objectives.masked import Part, score, weigh
from pretrain.rows import sent


@dataclass(frozen=True)
class MaskedCaptioning(Objective):
    """For the mix's `pairs`; every hidden word counts the same. Its head is MaskedData's head of words, with whose
    weights it begins and which pretrain.caption uses. It differs from unilm's code in two ways: the fifth of the words
    with the highest loss is not dropped after 12,000 steps, and `smoothing` spreads its share over all words, the
    target among them."""

    mask_ratio: float = 0.7  # unilm beit3/get_started/get_started_for_captioning.md
    smoothing: float = 0.1  # its default
    name = "masked"
    first_pass = False

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"masked.mask_ratio={self.mask_ratio} is no share of the words above 0; use 0.7")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"masked.smoothing={self.smoothing} is not a share; use at least 0 and less than 1")

    @property
    def masking(self) -> Masking:
        none = {"image_ratio": 0.0, "pair_image_ratio": 0.0, "text_ratio": 0.0}
        return Masking(**none, pair_text_ratio=self.mask_ratio, dual=False, mask_eos=True)

    def build(self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: Any = None) -> nn.Module:
        return MaskedCaptioningHead(layers.classifier(model.width("pair_texts"), model.vocab_size), self.smoothing)

    def problems(self, stage: Any) -> list[str]:
        if "pairs" not in stage.mix:
            return [f"captions need pairs in the mix (mix={sorted(stage.mix)}); add them"]
        return []

    def passes(self, layout: Layout) -> list[Pass]:
        return [Pass(causal_layout(layout))]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        """The expected ones: how many words are hidden is random."""
        rows = round(layout.pair_text_rows * self.mask_ratio)
        return [Product(rows, model.width("pair_texts"), model.vocab_size, classes=True)]


def causal_layout(layout: Layout) -> Layout:
    """The layout of the pass over the pairs alone, with causal texts."""
    return Layout(pairs=layout.pairs, patches=layout.patches, pair_len=layout.pair_len, causal=True)


class MaskedCaptioningHead(nn.Module):
    """A linear head over the vocabulary, on hidden words alone."""

    def __init__(self, text: nn.Module, smoothing: float):
        super().__init__()
        self.text, self.smoothing = text, smoothing

    @property
    def words(self) -> nn.Module:
        """As MaskedDataHeads'."""
        return self.text

    def needed_rows(self, batch: Batch) -> Kinds:
        """No row of the first pass, in which a word would see those behind it."""
        return Kinds.rows_of(batch.layout, batch.images.device)

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder) -> dict[str, Tensor]:
        """-> `loss`, the mean over hidden words, the same as `loss/caption`, and `accuracy/caption`."""
        captions = derived(batch, _captions)
        host = captions.on_host
        needed = Kinds.rows_of(host.layout, host.images.device)._replace(pair_texts=host.pair_masked)
        rows = encode(captions, needed=needed).pair_texts
        places = sent(host.pair_masked.flatten().nonzero().squeeze(1), captions.images.device)
        targets = captions.pair_tokens.flatten().index_select(0, places)
        part = Part(rows, places, targets, captions.pair_masked.sum(-1), captions.layout.pairs)
        weights, over = weigh(part, "targets")
        head = partial(self.text, smoothing=self.smoothing)
        shares = {"caption": weights / max(over, 1)}
        loss, report = score(head, {"caption": part}, {"caption": (weights, over)}, shares)
        return {"loss": loss, **report}

    def after_step(self) -> None:
        """Nothing moves between steps."""


def _captions(batch: Batch) -> Batch:
    layout, draws = batch.layout, {}
    if (drawn := batch.draws.get(DROP_PATH)) is not None:
        draws[DROP_PATH] = drawn[layout.images : layout.images + layout.pairs]
    return make_batch(
        causal_layout(layout),
        images=batch.images[layout.images :],
        pair_tokens=batch.pair_tokens,
        pair_inputs=batch.pair_inputs,
        pair_masked=batch.pair_masked,
        draws=draws,
    )
