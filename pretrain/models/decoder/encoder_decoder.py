"""BLIP's mixture of encoder and decoder (arXiv 2201.12086, 3.1): a vision encoder, and one BERT in three roles, which
share all but self-attention: texts alone, pairs whose words attend to the picture, and, in a causal pass, pairs in
which each word is predicted from the picture and the words before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Model, State
from pretrain.layers import PLAIN, Layers
from pretrain.models.decoder.block import EncoderDecoderBlock
from pretrain.models.decoder.causal_text import DecodedText
from pretrain.models.fusion import streams
from pretrain.models.multiway.embeddings import TextEmbedding
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.shape import MultiwayShape

STARTS = 2  # the last ids are the model's own: [DEC] begins a text that is decoded, [ENC] one that is fused


@dataclass(frozen=True)
class EncoderDecoder(Model):
    """`image_depth` blocks of a ViT and `text_depth` of a BERT, all of one width. The fused row of its first word
    stands for a pair: the encoder's `pair_images` is that row alone. `vocab_size` counts the tokenizer's ids and STARTS
    more."""

    dim: int
    heads: int
    ffn_dim: int
    image_depth: int
    text_depth: int
    image_size: int
    patch_size: int
    vocab_size: int
    max_text_len: int = 64
    image_norm_eps: float = 1e-6  # timm's ViT
    text_norm_eps: float = 1e-12  # BERT's
    init_std: float = 0.02
    shares_pictures = True

    def __post_init__(self) -> None:
        for name in ("text_depth", "image_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} is below 1; use 1 or more")
        assert self.shape  # its constructor refuses sizes that do not go together

    @property
    def reserved_ids(self) -> int:
        return STARTS

    @property
    def shape(self) -> MultiwayShape:
        """The shape of the vision encoder."""
        return streams.vit_shape(self, dim=self.dim, depth=self.image_depth, heads=self.heads, ffn_dim=self.ffn_dim)

    @property
    def text_shape(self) -> MultiwayShape:
        """The shape of the text embedding."""
        return replace(self.shape, text_norm=True, norm_eps=self.text_norm_eps)

    def build(
        self, experts: Sequence[str], layers: Layers = PLAIN, *, drop_path: float = 0.0, checkpointing: int = 0
    ) -> EncoderDecoderEncoder:
        return EncoderDecoderEncoder(self, layers, checkpointing=checkpointing)

    def problems(self, stage: Any) -> list[str]:
        problems = streams.patch_problems(stage, "EncoderDecoder")
        if stage.drop_path:
            problems.append(f"drop_path={stage.drop_path}: EncoderDecoder has none; set it to 0")
        if stage.masking is not None and "pairs" in stage.mix and stage.masking.ratios("pairs")[0]:
            problems.append(
                f"pair_image_ratio={stage.masking.ratios('pairs')[0]}: EncoderDecoder fuses no patches, so a pair's "
                "hidden patches cannot be predicted; set it to 0"
            )
        return problems

    def width(self, kind: str) -> int:
        return self.dim

    def flops(self, layout: Layout) -> int:
        total = streams.flops(layout, self.shape, replace(self.text_shape, depth=self.text_depth))
        return total + self.text_depth * streams.cross_attention_flops(layout, self.dim)

    def adapt(self, state: State, stored: Any, wanted: Mapping[str, tuple[int, ...]]) -> State:
        if not isinstance(stored, EncoderDecoder):
            return state
        return streams.fitted(state, stored.shape, self.shape, wanted, last=STARTS)

    def started(self, ids: Tensor, *, decoder: bool) -> Tensor:
        """int64 [N, L] -> the same ids with [DEC] or [ENC] in the place of BOS. L may be 0 only where N is 0."""
        first = torch.full_like(ids[:, :1], self.vocab_size - (2 if decoder else 1))
        return torch.cat([first, ids[:, 1:]], 1)


class EncoderDecoderEncoder(nn.Module):
    """See contracts.Encoder. Texts are computed with their padding, which no other row sees."""

    expert_names = ("vision", "language")

    def __init__(self, cfg: EncoderDecoder, layers: Layers = PLAIN, *, checkpointing: int = 0):
        super().__init__()
        self.cfg, self.checkpointing = cfg, checkpointing
        # Without `layers`: sequence ranks share the rows of Multiway models only.
        self.image = MultiwayEncoder(cfg.shape, ("vision",), checkpointing=checkpointing)
        self.text_embed = TextEmbedding(cfg.text_shape, layers)
        sizes, std = (cfg.dim, cfg.heads, cfg.ffn_dim), cfg.init_std
        self.text = nn.ModuleList(
            EncoderDecoderBlock(*sizes, eps=cfg.text_norm_eps, std=std) for _ in range(cfg.text_depth)
        )

    def forward(self, batch: Batch, needed: Kinds | None = None, pictures: Tensor | None = None) -> Kinds:
        layout, recompute = batch.layout, bool(self.checkpointing) and self.training
        alone, paired = streams.pictures(self.image, batch, pictures).split([layout.images, layout.pairs])
        pairs = self.cfg.started(batch.pair_inputs, decoder=layout.causal)
        words, seen = streams.words(self.text_embed, replace(batch, pair_inputs=pairs))
        for block in self.text:
            words = streams.run(block, words, seen, paired, layout.causal, recompute=recompute)
        fused, texts = words.split([layout.pairs, layout.texts])
        return Kinds(alone, fused[:, :1], fused[:, : layout.pair_len], texts[:, : layout.text_len])

    def causal_text(self, images: Tensor, longest: int) -> DecodedText:
        """See models/generation.py, text_reader."""
        return DecodedText(self, images)

    @property
    def token_table(self) -> nn.Parameter:
        return self.text_embed.tokens.weight
