"""Generation a few words at a time: the keys and values of a picture and of the words before are cached, so that a word
costs one row and not a whole pass.

The numbers are those of a pass with `Layout.causal`, where no word sees a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import Layout, make_batch
from pretrain.models.attention import attend_behind, attend_whole
from pretrain.models.multiway.block import MultiwayBlock

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class CausalText:
    """N pictures and `width` texts behind each: N * width texts, those of a picture together. `encoder` is a
    MultiwayEncoder with everything on one device; it runs without drop path. `images` uint8 [N, 3, H, W]; `longest`:
    the most ids of a text."""

    def __init__(self, encoder: Any, images: Tensor, longest: int):
        self.encoder, self.width = encoder, 1
        layout = Layout(pairs=len(images), patches=encoder.cfg.patches)
        biases: list[Any] = [None] * len(encoder.blocks)
        if encoder.relative_position is not None:
            both = Layout(pairs=1, patches=layout.patches, pair_len=longest)
            biases = [bias.pairs for bias in encoder.relative_position(both)]
        self._biases, self._image_len = biases, layout.image_len
        self._pictures = list[tuple[Tensor, Tensor]]()  # keys and values of each block, [N, image_len, H, C]
        self._words = list[tuple[Tensor, Tensor]]()  # the same of the words so far, [N * width, words, H, C]
        x_TD = encoder.vision_embed(make_batch(layout, images=images)).flatten(0, 1)
        for block, bias in zip(encoder.blocks, biases, strict=True):
            own = None if bias is None else bias[:, : self._image_len, : self._image_len]

            def attend(q: Tensor, k: Tensor, v: Tensor, own: Tensor | None = own) -> Tensor:
                self._pictures.append((k, v))
                self._words.append((k[:, :0], v[:, :0]))
                return attend_whole(q, k, v, own)

            x_TD = _through(block, x_TD, layout, len(images), attend)

    def read(self, ids: Tensor, keep: int | None = None) -> Tensor:
        """The next words of each text, int64 [N * width, L] -> their rows after the final norm [N * width, L, D]. Only
        the first `keep` of them (None: all) enter the cache."""
        first, layout = self._words[0][0].shape[1], Layout(pairs=len(ids), pair_len=ids.shape[1])
        start, end = self._image_len + first, self._image_len + first + ids.shape[1]
        x_TD = self.encoder.text_embed.at(ids, first).flatten(0, 1)
        for number, (block, bias) in enumerate(zip(self.encoder.blocks, self._biases, strict=True)):
            own = None if bias is None else bias[:, start:end, :end]

            def attend(q: Tensor, k: Tensor, v: Tensor, number: int = number, own: Tensor | None = own) -> Tensor:
                words = [torch.cat(both, 1) for both in zip(self._words[number], (k, v), strict=True)]
                kept = first + (ids.shape[1] if keep is None else keep)
                self._words[number] = (words[0][:, :kept], words[1][:, :kept])
                pictures = (part.repeat_interleave(self.width, 0) for part in self._pictures[number])
                keys, values = (torch.cat(both, 1) for both in zip(pictures, words, strict=True))
                return attend_behind(q, keys, values, own)

            x_TD = _through(block, x_TD, layout, len(ids), attend)
        return self.encoder.norm(x_TD, layout).unflatten(0, ids.shape)

    def choose(self, places: Tensor, width: int) -> None:
        """Goes on with the texts at `places`, int64 [N * width], and with `width` texts behind each picture: texts
        number n * width to (n + 1) * width - 1 must belong to picture n."""
        self._words = [(k.index_select(0, places), v.index_select(0, places)) for k, v in self._words]
        self.width = width


def _through(block: MultiwayBlock, x_TD: Tensor, layout: Layout, sequences: int, attend: Attend) -> Tensor:
    """The rows of one kind, x_TD, through a block with `attend` ([sequences, L, H, C] each) as its attention."""
    attention: Any = block.attention
    projected = attention.project(block.norm(x_TD, layout), layout)
    q, k, v = (x.unflatten(-1, (-1, attention.head_dim)).unflatten(0, (sequences, -1)) for x in projected)
    y_TD = attend(q, k, v).flatten(0, 1).flatten(-2)
    y_TD = attention.out(y_TD if attention.inner_norm is None else attention.inner_norm(y_TD, layout), layout)
    x_TD = x_TD + (y_TD if block.attention_scale is None else y_TD * block.attention_scale)
    y_TD = block.experts(x_TD, layout)
    return x_TD + (y_TD if block.expert_scale is None else y_TD * block.expert_scale)
