"""A block of BERT (arXiv 1810.04805), with a norm behind each branch and, if wanted, attention to a picture's rows.

Shapes: N sequences, L words, M rows of a picture, D width, H heads, C width of a head.
"""

from __future__ import annotations

import math
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.layers import Linear


class TextBlock(nn.Module):
    """`cross`: between self-attention and feed-forward network the words attend to a picture's rows, as in ALBEF's
    upper layers (arXiv 2107.07651, 3.1) and all of BLIP's."""

    def __init__(self, dim: int, heads: int, ffn_dim: int, *, eps: float, std: float, cross: bool = False):
        super().__init__()
        linear = partial(Linear, std=std, cut=math.inf)
        self.own = Attention(dim, heads, std=std)
        self.own_norm = nn.LayerNorm(dim, eps=eps)
        self.cross = Attention(dim, heads, std=std) if cross else None
        self.cross_norm = nn.LayerNorm(dim, eps=eps) if cross else None
        self.up, self.down = linear(dim, ffn_dim), linear(ffn_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)

    def forward(self, x_NLD: Tensor, seen: Tensor | None, picture_NMD: Tensor | None = None) -> Tensor:
        """-> [N, L, D]. `seen`: bool [N, 1, 1, L], False at padding; None: all rows are seen."""
        x_NLD = self.own_norm(x_NLD + self.own(x_NLD, x_NLD, seen))
        if self.cross is not None and self.cross_norm is not None:
            assert picture_NMD is not None
            x_NLD = self.cross_norm(x_NLD + self.cross(x_NLD, picture_NMD))
        return self.norm(x_NLD + self.down(F.gelu(self.up(x_NLD))))


class Attention(nn.Module):
    """Attention of rows `dim` wide to the rows of a context, `context_dim` wide (None: `dim`); self-attention where the
    context is the rows themselves. All heads together are `inner` wide (None: `dim`)."""

    def __init__(self, dim: int, heads: int, *, std: float, context_dim: int | None = None, inner: int | None = None):
        super().__init__()
        linear = partial(Linear, std=std, cut=math.inf)
        self.heads, context_dim, inner = heads, context_dim or dim, inner or dim
        self.q, self.k, self.v = linear(dim, inner), linear(context_dim, inner), linear(context_dim, inner)
        self.out = linear(inner, dim)

    def forward(self, rows: Tensor, context: Tensor, seen: Tensor | None = None) -> Tensor:
        """rows [N, L, dim], context [N, M, context_dim] -> [N, L, dim]. `seen`: which rows of the context each row may
        see, bool that broadcasts to [N, 1, L, M]; None: all."""
        return self.attend(rows, *self.keys(context), seen)

    def keys(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[N, M, context_dim] -> its keys and values, [N, H, M, C] each, which a decoder caches."""
        return self._heads(self.k(context)), self._heads(self.v(context))

    def attend(self, rows: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
        """As `forward`, with the context's keys and values."""
        q = self._heads(self.q(rows))
        return self.out(F.scaled_dot_product_attention(q, keys, values, seen).transpose(1, 2).flatten(2))

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.unflatten(-1, (self.heads, -1)).transpose(1, 2)
