"""A block of BLIP's text encoder and decoder (arXiv 2201.12086, 3.1), which share all but self-attention.

Shapes: N sequences, L words, M rows of a picture, D width, H heads, C width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.models.fusion.text_block import Attention, TextBlock

Keys = tuple[Tensor, Tensor]  # keys and values, [N, H, rows, C] each


class EncoderDecoderBlock(TextBlock):
    """A TextBlock with a second self-attention and its norm, the decoder's, in which no word sees a later one. Encoder
    and decoder share the same parts as in salesforce/BLIP, models/blip_pretrain.py, tie_encoder_decoder_weights."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, *, eps: float, std: float):
        super().__init__(dim, heads, ffn_dim, eps=eps, std=std, cross=True)
        self.causal = Attention(dim, heads, std=std)
        self.causal_norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x_NLD: Tensor, seen: Tensor, picture_NMD: Tensor | None = None, causal: bool = False) -> Tensor:
        """Words of pairs and, behind them, of texts alone -> the same rows behind this block. The words of pairs attend
        to their pictures, one for each pair; with `causal` they see no later word. `seen`: bool [N, 1, 1, L], False at
        padding. Every module runs, on zero rows if need be: ZeRO mixes up gradients of modules that are skipped."""
        assert picture_NMD is not None
        count, length = len(picture_NMD), x_NLD.shape[1]
        decoded = count if causal else 0
        before = torch.ones(length, length, dtype=torch.bool, device=x_NLD.device).tril()
        left, both = x_NLD.split([decoded, len(x_NLD) - decoded])
        left = self.causal_norm(left + self.causal(left, left, seen[:decoded] & before))
        both = self.own_norm(both + self.own(both, both, seen[decoded:]))
        fused, alone = torch.cat([left, both]).split([count, len(x_NLD) - count])
        return self._feed_forward(torch.cat([self._cross_attend(fused, self._cross.keys(picture_NMD)), alone]))

    def decode(self, x_NLD: Tensor, words: Keys, picture: Keys) -> tuple[Tensor, Keys]:
        """The next words of texts, of whose words so far `words` are the keys and values -> (the next words' rows [N,
        L, D], the keys and values of all words). `picture`: `picture_keys` of each text's picture."""
        keys, values = (torch.cat(both, 2) for both in zip(words, self.causal.keys(x_NLD), strict=True))
        new, old = x_NLD.shape[1], words[0].shape[2]
        seen = torch.ones(new, old + new, dtype=torch.bool, device=x_NLD.device).tril(old)
        x_NLD = self.causal_norm(x_NLD + self.causal.attend(x_NLD, keys, values, seen))
        return self._feed_forward(self._cross_attend(x_NLD, picture)), (keys, values)

    def picture_keys(self, picture_NMD: Tensor) -> Keys:
        """The keys and values of a picture's rows, which the words of all its texts attend to."""
        return self._cross.keys(picture_NMD)

    def _cross_attend(self, x_NLD: Tensor, picture: Keys) -> Tensor:
        assert self.cross_norm is not None
        return self.cross_norm(x_NLD + self._cross.attend(x_NLD, *picture))

    def _feed_forward(self, x_NLD: Tensor) -> Tensor:
        return self.norm(x_NLD + self.down(F.gelu(self.up(x_NLD))))

    @property
    def _cross(self) -> Attention:
        assert self.cross is not None
        return self.cross
