"""What flows through the system: a `Layout` (how many sequences of which kind) and a `Batch` (their contents).

Row order of every packed activation `x_TD`, top to bottom:

    image-only patches | pair patches | pair text | text-only

so the vision expert's rows are a prefix, the language expert's a suffix, and the fusion expert's the middle.
An image has one class row before its patches (`patches` counts both); a text begins with BOS and ends with EOS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

# Ids as XLM-R and BEiT-3's `beit3.spm` are used: see transformers.XLMRobertaTokenizer.
BOS, PAD, EOS, UNK = 0, 1, 2, 3
# Text positions that carry no target, and what cross-entropy ignores.
IGNORE = -100


@dataclass(frozen=True)
class Layout:
    """How many sequences of each kind a micro-batch holds, and how long each is. It decides the route: images only is
    the vision encoder, texts only the language encoder, pairs only the fusion encoder, images and texts the dual
    encoder, pairs with `causal` image-to-text generation, all three masked data modeling."""

    images: int = 0
    pairs: int = 0
    texts: int = 0
    patches: int = 0  # rows of one image: its class row and its patches
    pair_len: int = 0  # rows of one pair's text
    text_len: int = 0  # rows of one text-only sequence
    causal: bool = False  # pair text sees the image and the text before it; the image does not see the text

    @property
    def image_rows(self) -> int:
        return self.images * self.patches

    @property
    def pair_image_rows(self) -> int:
        return self.pairs * self.patches

    @property
    def pair_text_rows(self) -> int:
        return self.pairs * self.pair_len

    @property
    def text_rows(self) -> int:
        return self.texts * self.text_len

    @property
    def rows(self) -> int:
        return self.image_rows + self.pair_image_rows + self.pair_text_rows + self.text_rows

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of each kind: image-only, pair image, pair text, text-only."""
        return self.image_rows, self.pair_image_rows, self.pair_text_rows, self.text_rows

    @property
    def sequences(self) -> int:
        return self.images + self.pairs + self.texts

    @property
    def vision_rows(self) -> int:
        return self.image_rows + self.pair_image_rows

    @property
    def language_rows(self) -> int:
        return self.pair_text_rows + self.text_rows

    def split(self, *, fusion: bool) -> tuple[int, ...]:
        """Rows of (vision, language), or of (vision, fusion, language) in a block with a fusion expert."""
        return _by_expert(self.counts, fusion)


class Rows(NamedTuple):
    """Some of the rows of a packed pass, or some of such rows."""

    places: Tensor  # int64 [R], rising
    counts: tuple[int, ...]  # of each kind, as Layout.counts

    @classmethod
    def of(cls, chosen: Tensor, among: Layout | Rows) -> Rows:
        """Those for which `chosen`, bool [rows], is true."""
        counts = torch.stack([kind.sum() for kind in chosen.split(list(among.counts))]).tolist()
        return cls(chosen.nonzero().squeeze(1), tuple(counts))

    def split(self, *, fusion: bool) -> tuple[int, ...]:
        """As `Layout.split`."""
        return _by_expert(self.counts, fusion)


def _by_expert(counts: tuple[int, ...], fusion: bool) -> tuple[int, ...]:
    images, pair_images, pair_texts, texts = counts
    return (images, pair_images + pair_texts, texts) if fusion else (images + pair_images, pair_texts + texts)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. N = images + pairs, P = patches - 1, L = pair_len or text_len.

    `*_tokens` are clean ids, `*_inputs` what the encoder reads (some ids replaced), `*_masked` where a target stands;
    without masking the inputs equal the tokens and nothing is masked. Image-only pictures come before pair pictures.
    In a dual-encoder batch (images == texts, no pairs) image i belongs to text i.
    """

    layout: Layout
    images: Tensor  # uint8 [N, 3, H, W] (normalised on the device), or float, already normalised
    image_masks: Tensor  # bool [N, P], True: hidden from the encoder and to be predicted
    pair_tokens: Tensor  # int64 [pairs, pair_len], PAD behind EOS
    pair_inputs: Tensor  # int64 [pairs, pair_len]
    pair_masked: Tensor  # bool [pairs, pair_len]
    text_tokens: Tensor  # int64 [texts, text_len]
    text_inputs: Tensor  # int64 [texts, text_len]
    text_masked: Tensor  # bool [texts, text_len]
    image_codes: Tensor | None = None  # int64 [N, P], the visual tokenizer's codes; made on the device
    # float32 [sequences, 2 * depth] in [0, 1), each sequence's dice for drop path: drawn by the sample's own
    # generator, so that no number of ranks or micro-steps changes what is dropped. None: the encoder throws its own.
    noise: Tensor | None = None
    keys: tuple[str, ...] = ()  # "source/shard/key" of each sample: images, then pairs (or dual pairs), then texts

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in self.tensors()})

    def pin_memory(self) -> Batch:
        """For the data loader's pinning thread, so that the copy to the device runs beside the computation."""
        return replace(self, **{name: value.pin_memory() for name, value in self.tensors()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), Tensor):
                yield f.name, value


def make_batch(
    layout: Layout,
    *,
    images: Tensor | None = None,
    image_masks: Tensor | None = None,
    pair_tokens: Tensor | None = None,
    text_tokens: Tensor | None = None,
    **rest,
) -> Batch:
    """A batch from its clean parts; what is not given is empty, unmasked, or (inputs) equal to the tokens."""
    count = layout.images + layout.pairs
    images = torch.zeros(count, 3, 1, 1, dtype=torch.uint8) if images is None else images
    patches = max(layout.patches - 1, 0)
    no_text = torch.zeros(0, 0, dtype=torch.long, device=images.device)
    pair_tokens = no_text.new_zeros(0, layout.pair_len) if pair_tokens is None else pair_tokens
    text_tokens = no_text.new_zeros(0, layout.text_len) if text_tokens is None else text_tokens
    parts: dict = {
        "image_masks": torch.zeros(count, patches, dtype=torch.bool, device=images.device)
        if image_masks is None
        else image_masks,
        "pair_inputs": pair_tokens,
        "pair_masked": torch.zeros_like(pair_tokens, dtype=torch.bool),
        "text_inputs": text_tokens,
        "text_masked": torch.zeros_like(text_tokens, dtype=torch.bool),
    }
    return Batch(layout, images=images, pair_tokens=pair_tokens, text_tokens=text_tokens, **(parts | rest))
