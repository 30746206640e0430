"""Generation by an EncoderDecoder a few words at a time: what models/multiway/causal_text.py is for Multiway models."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pretrain.batch import Layout, make_batch
from pretrain.models.decoder.block import Keys
from pretrain.models.fusion import streams


class DecodedText:
    """N pictures and `width` texts behind each: N * width texts, those of a picture together. Keys and values are
    cached, a picture's once for all its texts, the words' for each text. `encoder` is an EncoderDecoderEncoder with
    everything on one device; `images` uint8 [N, 3, H, W]."""

    def __init__(self, encoder: Any, images: Tensor):
        self.encoder, self.width, self._read = encoder, 1, 0
        layout = Layout(pairs=len(images), patches=encoder.cfg.shape.patches)
        pictures = streams.pictures(encoder.image, make_batch(layout, images=images))
        self._pictures: list[Keys] = [block.picture_keys(pictures) for block in encoder.text]
        self._words: list[Keys] = [(k[:, :, :0], v[:, :, :0]) for k, v in self._pictures]

    def read(self, ids: Tensor, keep: int | None = None) -> Tensor:
        """See multiway.causal_text.CausalText.read."""
        first, kept = self._read, self._read + (ids.shape[1] if keep is None else keep)
        x_NLD = self.encoder.text_embed.at(self.encoder.cfg.started(ids, decoder=True) if first == 0 else ids, first)
        for number, block in enumerate(self.encoder.text):
            picture = tuple(part.repeat_interleave(self.width, 0) for part in self._pictures[number])
            x_NLD, (keys, values) = block.decode(x_NLD, self._words[number], picture)
            self._words[number] = keys[:, :, :kept], values[:, :, :kept]
        self._read = kept
        return x_NLD

    def choose(self, places: Tensor, width: int) -> None:
        """See multiway.causal_text.CausalText.choose."""
        self._words = [(k.index_select(0, places), v.index_select(0, places)) for k, v in self._words]
        self.width = width
