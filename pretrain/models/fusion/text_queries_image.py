"""Fusion in the middle: a vision and a text encoder, and above them blocks in which the words attend to the picture
(ALBEF, arXiv 2107.07651, 3.1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Model, State
from pretrain.flops import flops_per_sequence
from pretrain.layers import PLAIN, Layers
from pretrain.models.fusion import streams
from pretrain.models.fusion.text_block import TextBlock
from pretrain.models.multiway.embeddings import TextEmbedding
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.shape import MultiwayShape


@dataclass(frozen=True)
class TextQueriesImage(Model):
    """`image_depth` blocks of a ViT; `text_depth` blocks of a BERT, and `fusion_depth` more that attend to the picture.
    All are of one width. The fused row of BOS stands for a pair: the encoder's `pair_images` is that row alone.
    """

    dim: int
    heads: int
    ffn_dim: int
    image_depth: int
    text_depth: int
    fusion_depth: int
    image_size: int
    patch_size: int
    vocab_size: int
    max_text_len: int = 64
    image_norm_eps: float = 1e-6  # timm's ViT
    text_norm_eps: float = 1e-12  # BERT's
    init_std: float = 0.02
    shares_pictures = True

    def __post_init__(self) -> None:
        for name in ("text_depth", "fusion_depth", "image_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} is below 1; use 1 or more")
        assert self.shape  # its constructor refuses sizes that do not go together

    @property
    def shape(self) -> MultiwayShape:
        """The shape of the vision encoder; the text embedding differs by its norm."""
        return streams.vit_shape(self, dim=self.dim, depth=self.image_depth, heads=self.heads, ffn_dim=self.ffn_dim)

    def build(
        self, experts: Sequence[str], layers: Layers = PLAIN, *, drop_path: float = 0.0, checkpointing: int = 0
    ) -> TextQueriesImageEncoder:
        return TextQueriesImageEncoder(self, layers, checkpointing=checkpointing)

    def problems(self, stage: Any) -> list[str]:
        problems = streams.problems(stage, "TextQueriesImage") + streams.patch_problems(stage, "TextQueriesImage")
        if stage.masking is not None and "pairs" in stage.mix and stage.masking.ratios("pairs")[0]:
            problems.append(
                f"pair_image_ratio={stage.masking.ratios('pairs')[0]}: TextQueriesImage fuses no patches, so a pair's "
                "hidden patches cannot be predicted; set it to 0"
            )
        return problems

    def width(self, kind: str) -> int:
        return self.dim

    def flops(self, layout: Layout) -> int:
        total = streams.flops(layout, self.shape, replace(self.shape, depth=self.text_depth))
        sizes = {"dim": self.dim, "ffn_dim": self.ffn_dim}
        total += int(layout.pairs * flops_per_sequence(layout.pair_len, depth=self.fusion_depth, **sizes))
        return total + self.fusion_depth * streams.cross_attention_flops(layout, self.dim)

    def adapt(self, state: State, stored: Any, wanted: Mapping[str, tuple[int, ...]]) -> State:
        """As MultiwayConfig's: positions of another grid, fewer words, more words in the vocabulary."""
        if not isinstance(stored, TextQueriesImage):
            return state
        return streams.fitted(state, stored.shape, self.shape, wanted)


class TextQueriesImageEncoder(nn.Module):
    """See contracts.Encoder. Texts are computed with their padding, which no other row sees."""

    def __init__(self, cfg: TextQueriesImage, layers: Layers = PLAIN, *, checkpointing: int = 0):
        super().__init__()
        self.cfg, self.checkpointing = cfg, checkpointing
        # Without `layers`: sequence ranks share the rows of Multiway models only.
        self.image = MultiwayEncoder(cfg.shape, ("vision",), checkpointing=checkpointing)
        self.text_embed = TextEmbedding(_with_norm(cfg), layers)
        sizes = (cfg.dim, cfg.heads, cfg.ffn_dim)
        options: dict[str, Any] = {"eps": cfg.text_norm_eps, "std": cfg.init_std}
        self.text = nn.ModuleList(TextBlock(*sizes, **options) for _ in range(cfg.text_depth))
        self.fusion = nn.ModuleList(TextBlock(*sizes, **options, cross=True) for _ in range(cfg.fusion_depth))

    def forward(self, batch: Batch, needed: Kinds | None = None, pictures: Tensor | None = None) -> Kinds:
        layout, recompute = batch.layout, bool(self.checkpointing) and self.training
        alone, paired = streams.pictures(self.image, batch, pictures).split([layout.images, layout.pairs])
        words, seen = streams.words(self.text_embed, batch)
        for block in self.text:
            words = streams.run(block, words, seen, recompute=recompute)
        fused, texts = words.split([layout.pairs, layout.texts])
        for block in self.fusion:  # also without pairs: ZeRO mixes up gradients of modules that are skipped
            fused = streams.run(block, fused, seen[: layout.pairs], paired, recompute=recompute)
        return Kinds(alone, fused[:, :1], fused[:, : layout.pair_len], texts[:, : layout.text_len])

    @property
    def token_table(self) -> nn.Parameter:
        return self.text_embed.tokens.weight


def _with_norm(cfg: TextQueriesImage) -> MultiwayShape:
    return replace(cfg.shape, text_norm=True, norm_eps=cfg.text_norm_eps)
