"""Fusion at several depths: the words attend to a picture's rows behind several blocks of its encoder, as in
BridgeTower (arXiv 2206.08657, 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.layers import PLAIN, Layers
from pretrain.models.fusion import streams
from pretrain.models.fusion.text_queries_image import TextQueriesImage, TextQueriesImageEncoder


@dataclass(frozen=True)
class SeveralDepths(TextQueriesImage):
    """TextQueriesImage whose fusion block i attends to the rows behind block `image_at[i]` of the ViT, counted from 1,
    each depth through a norm of its own. A picture alone has the rows of the last block, as in TextQueriesImage."""

    image_at: tuple[int, ...] = ()
    shares_pictures = False  # rows of kind images are of the last depth only

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_at", tuple(self.image_at))  # a list in config.json
        super().__post_init__()
        at, depth = self.image_at, self.image_depth
        rising = all(first < second for first, second in pairwise((0, *at)))
        if len(at) != self.fusion_depth or not rising or at[-1] != depth:
            wanted = tuple(range(depth - self.fusion_depth + 1, depth + 1))
            way = f"use rising numbers that end there, such as {wanted}" if wanted[0] > 0 else "fuse in fewer blocks"
            raise ValueError(
                f"model.image_at={at} does not name one of the {depth} blocks of pictures for each of the "
                f"{self.fusion_depth} fusion blocks, and the last for the last; {way}"
            )

    def build(
        self, experts: Sequence[str], layers: Layers = PLAIN, *, drop_path: float = 0.0, checkpointing: int = 0
    ) -> SeveralDepthsEncoder:
        return SeveralDepthsEncoder(self, layers, checkpointing=checkpointing)


class SeveralDepthsEncoder(TextQueriesImageEncoder):
    """See contracts.Encoder. Texts are computed with their padding, which no other row sees."""

    def __init__(self, cfg: SeveralDepths, layers: Layers = PLAIN, *, checkpointing: int = 0):
        super().__init__(cfg, layers, checkpointing=checkpointing)
        self.at = cfg.image_at
        # The last depth goes through the ViT's own final norm.
        self.depth_norms = nn.ModuleList(nn.LayerNorm(cfg.dim, eps=cfg.image_norm_eps) for _ in cfg.image_at[:-1])

    def forward(self, batch: Batch, needed: Kinds | None = None, pictures: Tensor | None = None) -> Kinds:
        layout, recompute = batch.layout, bool(self.checkpointing) and self.training
        depths = self._depths(batch)
        words, seen = streams.words(self.text_embed, batch)
        for block in self.text:
            words = streams.run(block, words, seen, recompute=recompute)
        fused, texts = words.split([layout.pairs, layout.texts])
        for block, rows in zip(self.fusion, depths, strict=True):
            fused = streams.run(block, fused, seen[: layout.pairs], rows[layout.images :], recompute=recompute)
        alone = depths[-1][: layout.images]
        return Kinds(alone, fused[:, :1], fused[:, : layout.pair_len], texts[:, : layout.text_len])

    def _depths(self, batch: Batch) -> list[Tensor]:
        """The pictures' rows at each depth, after its norm: [images + pairs, image_len, dim] each."""
        cfg, layout = self.image.cfg, batch.layout
        only = Layout(images=layout.images + layout.pairs, patches=cfg.patches)
        if not only.images:  # an evaluation of texts
            return [streams.pictures(self.image, batch) for _ in self.at]
        *lower, last = self.image.depths(streams.pictures_alone(only, batch), self.at)
        normed = [norm(rows) for norm, rows in zip(self.depth_norms, lower, strict=True)]
        return [rows.unflatten(0, (only.images, only.image_len)) for rows in (*normed, self.image.norm(last, only))]
