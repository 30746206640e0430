"""Fusion in the middle by co-attention: a stream of pictures and one of words, each of its own width, that attend to
each other before chosen blocks (ViLBERT, arXiv 1908.02265, 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Model, State
from pretrain.flops import Product, encoder_flops, product_flops
from pretrain.layers import PLAIN, Layers, Linear
from pretrain.models.fusion import streams
from pretrain.models.fusion.pooled import PooledFusion, check_kind
from pretrain.models.fusion.text_block import Attention, TextBlock
from pretrain.models.multiway.embeddings import TextEmbedding
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.shape import MultiwayShape


@dataclass(frozen=True)
class CoAttention(Model):
    """`dim`, `heads`, `ffn_dim` are the sizes of the words' stream, `text_depth` blocks of a BERT. The pictures' stream
    has `image_depth` blocks, behind `vit_depth` blocks of a ViT of the same width, where ViLBERT has a detector's
    regions.

    Co-attention i stands before block `text_at[i]` of the words and block `image_at[i]` of the pictures, counted from
    0. Its queries, keys and values are `co_dim` wide; 0: as wide as both streams, which must then be of one width.

    A picture or a text alone goes through its own stream's blocks. Row 0 of a pair's `pair_images` is the fused one
    (see PooledFusion); the other rows are its patches', which have seen its words.
    """

    dim: int
    heads: int
    ffn_dim: int
    text_depth: int
    image_dim: int
    image_heads: int
    image_ffn_dim: int
    vit_depth: int
    image_depth: int
    text_at: tuple[int, ...]
    image_at: tuple[int, ...]
    image_size: int
    patch_size: int
    vocab_size: int
    co_dim: int = 0
    co_heads: int = 8
    vit_ffn_dim: int = 0  # 0: four times image_dim
    max_text_len: int = 64
    fusion: str = "bilinear"  # the kind of PooledFusion that makes the row that stands for a pair
    image_norm_eps: float = 1e-6  # timm's ViT
    text_norm_eps: float = 1e-12  # BERT's, in both streams
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for side in ("text", "image"):
            object.__setattr__(self, f"{side}_at", tuple(getattr(self, f"{side}_at")))  # a list in config.json
            self._check_places(f"{side}_at", getattr(self, f"{side}_at"), f"{side}_depth")
        if len(self.text_at) != len(self.image_at):
            raise ValueError(
                f"model.text_at={self.text_at} and model.image_at={self.image_at} are not of one length; a "
                "co-attention has one place in each stream"
            )
        if not self.co_dim and self.dim != self.image_dim:
            raise ValueError(
                f"model.dim={self.dim} and model.image_dim={self.image_dim} differ, and model.co_dim=0 projects "
                f"neither; set model.co_dim={max(self.dim, self.image_dim)}"
            )
        if self.co_heads < 1 or self.width_between % self.co_heads:
            raise ValueError(
                f"model.co_heads={self.co_heads} does not divide the co-attention's width {self.width_between}; use "
                f"{math.gcd(self.width_between, max(self.co_heads, 1))}"
            )
        check_kind(self.fusion, "fusion")
        assert self.shape and self.text_shape  # their constructors refuse sizes that do not go together

    def _check_places(self, name: str, places: tuple[int, ...], depth: str) -> None:
        blocks = getattr(self, depth)
        rising = all(first < second for first, second in pairwise(places))
        if not places or not rising or places[0] < 0 or places[-1] >= blocks:
            raise ValueError(
                f"model.{name}={places} does not name blocks of model.{depth}={blocks} in order; use rising numbers "
                f"from 0 to {blocks - 1}"
            )

    @property
    def width_between(self) -> int:
        """The width of the co-attention's queries, keys and values."""
        return self.co_dim or self.dim

    @property
    def shape(self) -> MultiwayShape:
        """The shape of the ViT below the pictures' stream."""
        return streams.vit_shape(
            self,
            dim=self.image_dim,
            depth=self.vit_depth,
            heads=self.image_heads,
            ffn_dim=self.vit_ffn_dim or 4 * self.image_dim,
        )

    @property
    def text_shape(self) -> MultiwayShape:
        """The shape of the words' stream and its embedding."""
        sizes: Any = {"dim": self.dim, "heads": self.heads, "ffn_dim": self.ffn_dim, "depth": self.text_depth}
        return replace(self.shape, text_norm=True, norm_eps=self.text_norm_eps, **sizes)

    def build(
        self, experts: Sequence[str], layers: Layers = PLAIN, *, drop_path: float = 0.0, checkpointing: int = 0
    ) -> CoAttentionEncoder:
        return CoAttentionEncoder(self, layers, checkpointing=checkpointing)

    def problems(self, stage: Any) -> list[str]:
        return streams.problems(stage, "CoAttention")

    def width(self, kind: str) -> int:
        return self.image_dim if kind in ("images", "pair_images") else self.dim

    def flops(self, layout: Layout) -> int:
        pictures = Layout(images=layout.images + layout.pairs, patches=layout.patches)
        stream = {"dim": self.image_dim, "depth": self.image_depth, "ffn_dim": self.image_ffn_dim}
        total = streams.flops(layout, self.shape, self.text_shape) + encoder_flops(pictures, **stream)
        words, rows = round(layout.pairs * layout.pair_len), layout.pairs * layout.image_len
        between, co = self.width_between, []
        # On each side: queries and outputs of its own rows, keys and values for the other's, its feed-forward network.
        for own, dim, ffn_dim in ((words, self.dim, self.ffn_dim), (rows, self.image_dim, self.image_ffn_dim)):
            co += [Product(4 * own, dim, between), Product(2 * own, dim, ffn_dim)]
        scores = round(2 * 3 * 2 * 2 * layout.pairs * layout.pair_len * layout.image_len * between)
        return total + len(self.text_at) * (product_flops(co) + scores)

    def adapt(self, state: State, stored: Any, wanted: Mapping[str, tuple[int, ...]]) -> State:
        if not isinstance(stored, CoAttention):
            return state
        return streams.fitted(state, stored.shape, self.shape, wanted)


class CoAttentionEncoder(nn.Module):
    """See contracts.Encoder. Texts are computed with their padding, which no other row sees."""

    def __init__(self, cfg: CoAttention, layers: Layers = PLAIN, *, checkpointing: int = 0):
        super().__init__()
        self.cfg, self.checkpointing = cfg, checkpointing
        self.vit = MultiwayEncoder(cfg.shape, ("vision",), checkpointing=checkpointing)
        self.text_embed = TextEmbedding(cfg.text_shape, layers)
        options: dict[str, Any] = {"eps": cfg.text_norm_eps, "std": cfg.init_std}
        text, image = (cfg.dim, cfg.heads, cfg.ffn_dim), (cfg.image_dim, cfg.image_heads, cfg.image_ffn_dim)
        self.text = nn.ModuleList(TextBlock(*text, **options) for _ in range(cfg.text_depth))
        self.image = nn.ModuleList(TextBlock(*image, **options) for _ in range(cfg.image_depth))
        self.co = nn.ModuleList(CoAttentionBlock(cfg) for _ in cfg.text_at)
        self.pair = PooledFusion(cfg.fusion, cfg.image_dim, cfg.dim, cfg.image_dim, std=cfg.init_std)

    def forward(self, batch: Batch, needed: Kinds | None = None) -> Kinds:
        layout, cfg = batch.layout, self.cfg
        run = partial(streams.run, recompute=bool(self.checkpointing) and self.training)
        picture, (words, seen) = streams.pictures(self.vit, batch), streams.words(self.text_embed, batch)
        text, image = list(self.text), list(self.image)
        text_from, image_from = 0, 0
        # After the last co-attention come the blocks that are left.
        ends = zip((*cfg.text_at, len(text)), (*cfg.image_at, len(image)), strict=True)
        for co, (text_at, image_at) in zip((*self.co, None), ends, strict=True):
            for block in text[text_from:text_at]:
                words = run(block, words, seen)
            for block in image[image_from:image_at]:
                picture = run(block, picture, None)
            alone, paired = picture.split([layout.images, layout.pairs])
            paired_words, texts = words.split([layout.pairs, layout.texts])
            if co is not None:  # on no pair too: ZeRO mixes up gradients of modules that are skipped
                paired_words, paired = run(co, paired_words, seen[: layout.pairs], paired)
                words, picture = torch.cat([paired_words, texts]), torch.cat([alone, paired])
                text_from, image_from = text_at, image_at
        fused = self.pair(paired[:, 0], paired_words[:, 0]).unsqueeze(1)
        rows = torch.cat([fused, paired[:, 1:]], 1)
        return Kinds(alone, rows, paired_words[:, : layout.pair_len], texts[:, : layout.text_len])

    @property
    def token_table(self) -> nn.Parameter:
        return self.text_embed.tokens.weight


class CoAttentionBlock(nn.Module):
    """Words and picture attend to each other at once, and a feed-forward network follows in each stream."""

    def __init__(self, cfg: CoAttention):
        super().__init__()
        self.text = CrossAttention(cfg, cfg.dim, cfg.image_dim, cfg.ffn_dim)
        self.image = CrossAttention(cfg, cfg.image_dim, cfg.dim, cfg.image_ffn_dim)

    def forward(self, words: Tensor, seen: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        """words [N, L, dim], seen bool [N, 1, 1, L] (False at padding), picture [N, M, image_dim] -> both streams'
        rows."""
        return self.text(words, picture), self.image(picture, words, seen)


class CrossAttention(nn.Module):
    """One stream's half: attention to the other's rows, then a feed-forward network, a norm behind each branch."""

    def __init__(self, cfg: CoAttention, dim: int, context_dim: int, ffn_dim: int):
        super().__init__()
        linear = partial(Linear, std=cfg.init_std, cut=math.inf)
        self.cross = Attention(dim, cfg.co_heads, std=cfg.init_std, context_dim=context_dim, inner=cfg.width_between)
        self.cross_norm = nn.LayerNorm(dim, eps=cfg.text_norm_eps)
        self.up, self.down = linear(dim, ffn_dim), linear(ffn_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=cfg.text_norm_eps)

    def forward(self, rows: Tensor, context: Tensor, seen: Tensor | None = None) -> Tensor:
        """rows [N, L, dim], context [N, M, context_dim], seen bool [N, 1, 1, M] (None: all) -> [N, L, dim]"""
        rows = self.cross_norm(rows + self.cross(rows, context, seen))
        return self.norm(rows + self.down(F.gelu(self.up(rows))))
