"""Fusion from the first block on: words and a picture's features in a single stream of BERT's blocks, as in VL-BERT
(arXiv 1908.08530) and UNITER (arXiv 1909.11740).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Model, State
from pretrain.flops import Product, flops_per_sequence, product_flops
from pretrain.layers import PLAIN, Layers, Linear
from pretrain.models.fusion import streams
from pretrain.models.fusion.text_block import TextBlock
from pretrain.models.multiway.embeddings import TextEmbedding
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.shape import MultiwayShape


@dataclass(frozen=True)
class SingleStream(Model):
    """`dim`, `heads`, `ffn_dim` are the sizes of the stream, `depth` blocks of a BERT. A picture comes in as the rows
    of a ViT of `vit_depth` blocks, `vit_dim` wide, where UNITER has a detector's regions; a linear layer and a norm
    turn them into features. The norm's bias distinguishes features from words, as a learned row does in the papers.

    A picture or a text alone goes through the stream alone. Row 0 of a pair's picture stands for the pair.
    """

    dim: int
    heads: int
    ffn_dim: int
    depth: int
    vit_dim: int
    vit_heads: int
    vit_depth: int
    image_size: int
    patch_size: int
    vocab_size: int
    max_text_len: int = 64
    image_norm_eps: float = 1e-6  # timm's ViT
    text_norm_eps: float = 1e-12  # BERT's, in the stream
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"model.depth={self.depth} is below 1; use 1 or more")
        assert self.shape and self.text_shape  # their constructors refuse sizes that do not go together

    @property
    def shape(self) -> MultiwayShape:
        """The shape of the ViT."""
        return streams.vit_shape(
            self, dim=self.vit_dim, depth=self.vit_depth, heads=self.vit_heads, ffn_dim=4 * self.vit_dim
        )

    @property
    def text_shape(self) -> MultiwayShape:
        """The shape of the stream and of its text embedding."""
        sizes: Any = {"dim": self.dim, "heads": self.heads, "ffn_dim": self.ffn_dim, "depth": self.depth}
        return replace(self.shape, text_norm=True, norm_eps=self.text_norm_eps, **sizes)

    def build(
        self, experts: Sequence[str], layers: Layers = PLAIN, *, drop_path: float = 0.0, checkpointing: int = 0
    ) -> SingleStreamEncoder:
        return SingleStreamEncoder(self, layers, checkpointing=checkpointing)

    def problems(self, stage: Any) -> list[str]:
        return streams.problems(stage, "SingleStream")

    def width(self, kind: str) -> int:
        return self.dim

    def flops(self, layout: Layout) -> int:
        pictures = layout.images + layout.pairs
        total = streams.flops(replace(layout, texts=0, pairs=0, images=pictures), self.shape, self.text_shape)
        total += product_flops([Product(pictures * layout.image_len, self.vit_dim, self.dim)])
        sizes = {"dim": self.dim, "depth": self.depth, "ffn_dim": self.ffn_dim}
        lengths = ((layout.images, layout.image_len), (layout.pairs, layout.image_len + layout.pair_len),
                   (layout.texts, layout.text_len))  # fmt: skip
        return total + int(sum(count * flops_per_sequence(length, **sizes) for count, length in lengths))

    def adapt(self, state: State, stored: Any, wanted: Mapping[str, tuple[int, ...]]) -> State:
        """As MultiwayConfig's: positions of another grid, fewer words, more words in the vocabulary."""
        if not isinstance(stored, SingleStream):
            return state
        return streams.fitted(state, stored.shape, self.shape, wanted)


class SingleStreamEncoder(nn.Module):
    """See contracts.Encoder. Texts are computed with their padding, which no other row sees."""

    def __init__(self, cfg: SingleStream, layers: Layers = PLAIN, *, checkpointing: int = 0):
        super().__init__()
        self.cfg, self.checkpointing = cfg, checkpointing
        # Without `layers`: sequence ranks share the rows of Multiway models only.
        self.vit = MultiwayEncoder(cfg.shape, ("vision",), checkpointing=checkpointing)
        self.feature = Linear(cfg.vit_dim, cfg.dim, std=cfg.init_std, cut=math.inf)
        self.feature_norm = nn.LayerNorm(cfg.dim, eps=cfg.text_norm_eps)
        self.text_embed = TextEmbedding(cfg.text_shape, layers)
        sizes: Any = {"eps": cfg.text_norm_eps, "std": cfg.init_std}
        self.stream = nn.ModuleList(TextBlock(cfg.dim, cfg.heads, cfg.ffn_dim, **sizes) for _ in range(cfg.depth))

    def forward(self, batch: Batch, needed: Kinds | None = None) -> Kinds:
        layout = batch.layout
        run = partial(streams.run, recompute=bool(self.checkpointing) and self.training)
        features = self.feature_norm(self.feature(streams.pictures(self.vit, batch)))
        alone, paired = features.split([layout.images, layout.pairs])
        words, seen = streams.words(self.text_embed, batch)
        paired_words, texts = words.split([layout.pairs, layout.texts])
        pairs = torch.cat([paired, paired_words], 1)
        seen_pairs, seen_texts = seen.split([layout.pairs, layout.texts])
        # layout.image_len is 0 without pictures, and torch before 2.13 compares the sizes of empty tensors too.
        seen_pairs = F.pad(seen_pairs, (paired.shape[1], 0), value=True)
        for block in self.stream:  # also where a kind has no rows: every rank must call the same modules
            alone, pairs, texts = run(block, alone, None), run(block, pairs, seen_pairs), run(block, texts, seen_texts)
        image, text = pairs.split([layout.image_len, pairs.shape[1] - layout.image_len], 1)
        return Kinds(alone, image, text[:, : layout.pair_len], texts[:, : layout.text_len])

    @property
    def token_table(self) -> nn.Parameter:
        return self.text_embed.tokens.weight
