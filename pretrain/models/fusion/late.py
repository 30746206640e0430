"""Fusion at the end: two encoders of transformers side by side, and for a pair one row that is made from its picture's
and its text's. Contrast compares the two rows; matching reads the fused one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pretrain.batch import Batch, Kinds, Layout
from pretrain.flops import Product, product_flops
from pretrain.layers import PLAIN, Layers
from pretrain.models.fusion import streams
from pretrain.models.fusion.pooled import PooledFusion, check_kind
from pretrain.models.towers.dual import DualTowers, Towers


@dataclass(frozen=True)
class LateFusion(DualTowers):
    """DualTowers with a PooledFusion above them. No objective can read words or patches."""

    kind: str = "mlp"  # of the PooledFusion
    pair_dim: int = 0  # width of the fused row; 0: as wide as the vision tower's

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kind(self.kind, "kind")
        if self.pair_dim < 0:
            raise ValueError(f"model.pair_dim={self.pair_dim} is negative; use a width, or 0 for the vision tower's")

    def build(
        self, experts: Sequence[str], layers: Layers = PLAIN, *, drop_path: float = 0.0, checkpointing: int = 0
    ) -> FusedTowers:
        return FusedTowers(self, layers, checkpointing=bool(checkpointing))

    def problems(self, stage: Any) -> list[str]:
        problems = streams.problems(stage, "LateFusion") + streams.patch_problems(stage, "LateFusion")
        return problems + [
            f"the objective {objective.name} hides words or patches, and LateFusion gives one row for each picture, "
            "text and pair; take it out, or use CoAttention or TextQueriesImage"
            for objective in stage.objectives
            if objective.masking is not None
        ]

    def width(self, kind: str) -> int:
        if kind == "pair_images":
            return self.pair_dim or self.vision.width
        return (self.vision if kind == "images" else self.text).width

    def flops(self, layout: Layout) -> int:
        total = super().flops(replace(layout, images=layout.images + layout.pairs))
        total += super().flops(Layout(texts=layout.pairs, text_len=layout.pair_len))
        return total + product_flops([Product(layout.pairs, *sizes) for sizes in self._products()])

    def _products(self) -> list[tuple[int, int]]:
        image, text, dim = self.vision.width, self.text.width, self.width("pair_images")
        joint, apart = [(image + text, dim)], [(image, dim), (text, dim)]
        return {"mlp": [*joint, (dim, dim)], "gated": joint + apart, "bilinear": apart}[self.kind]


class FusedTowers(Towers):
    """See contracts.Encoder. Each kind has one row, [n, 1, width]; `pair_texts` is the text's row before fusion."""

    def __init__(self, cfg: LateFusion, layers: Layers = PLAIN, *, checkpointing: bool = False):
        super().__init__(cfg, layers, checkpointing=checkpointing)
        sizes = (cfg.vision.width, cfg.text.width, cfg.width("pair_images"))
        self.pair = PooledFusion(cfg.kind, *sizes)

    def forward(self, batch: Batch, needed: Kinds | None = None) -> Kinds:
        layout = batch.layout
        count = layout.images + layout.pairs
        pictures = self.vision.images(batch.images) if count else self._none("images")
        images, paired = pictures.split([layout.images, layout.pairs])
        # Each kind at its own length: a tower that reads padding like words depends on how much of it there is.
        words, texts = self._texts(batch.pair_inputs), self._texts(batch.text_inputs)
        fused = self.pair(paired, words)  # of no pair too: ZeRO mixes up gradients of modules that are skipped
        return Kinds(*(rows.unsqueeze(1) for rows in (images, fused, words, texts)))
