"""Image-text contrast over the whole data-parallel batch: BEiT-3's intermediate fine-tuning for retrieval (App. A)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Encoder, Objective
from pretrain.flops import Product
from pretrain.layers import PLAIN, Head, Layers

MAX_SCALE = 100.0  # CLIP (arXiv 2103.00020, 2.5): "clipped to prevent scaling the logits by more than 100"


@dataclass(frozen=True)
class Contrastive(Objective):
    """Softmax contrast of class rows and BOS rows; `embed_dim` None keeps the model's width, as BEiT-3 does."""

    embed_dim: int | None = None
    temperature: float = 0.07  # at the start; learned
    name = "contrastive"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"objectives: temperature={self.temperature} must be above 0; CLIP begins with 0.07")

    def build(
        self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: nn.Parameter | None = None
    ) -> ContrastiveHead:
        return ContrastiveHead(self._width(model), self.embed_dim, self.temperature, layers)

    def problems(self, stage: Any) -> list[str]:
        problems = []
        if "dual" not in stage.mix or stage.batch.accumulation != 1:
            problems.append(
                f"contrastive needs dual in the mix and batch.accumulation=1 (mix={sorted(stage.mix)}, "
                f"accumulation={stage.batch.accumulation}): its negatives are the whole step's batch"
            )
        if stage.parallel.pipe > 1:
            problems.append(
                f"parallel.pipe={stage.parallel.pipe} does not go with the objective contrastive, whose negatives are "
                "the whole step's batch and not one micro-step's; set parallel.pipe=1 and split by parallel.tensor or "
                "ZeRO-3"
            )
        return problems

    def products(self, layout: Layout, model: Any) -> list[Product]:
        images, texts = self._width(model)
        return [
            Product(layout.dual, images, self.embed_dim or images),
            Product(layout.dual, texts, self.embed_dim or images),
        ]

    def _width(self, model: Any) -> tuple[int, int]:
        return model.width("images"), model.width("texts")


class ContrastiveHead(nn.Module):
    """Linear projections without bias and a learned logit scale, as unilm's beit3 BEiT3ForRetrieval. `widths`: of image
    rows and text rows."""

    def __init__(self, widths: tuple[int, int], embed_dim: int | None, temperature: float, layers: Layers = PLAIN):
        super().__init__()
        images, texts = widths
        self.vision = Head(images, embed_dim or images, bias=False)
        self.language = Head(texts, embed_dim or images, bias=False)
        self.gather = layers.gather
        # One element and not a scalar: ZeRO-3 partitions by rows.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))

    @property
    def width(self) -> int:
        """E of the unit vectors."""
        return self.vision.weight.shape[0]

    def needed_rows(self, batch: Batch) -> Kinds:
        """The class row of each image and the first row of each text that belong to a dual pair."""
        layout = batch.layout
        rows = Kinds.rows_of(layout, batch.images.device)
        rows.images[layout.images - layout.dual :, :1] = True
        rows.texts[: layout.dual, :1] = True
        return rows

    def embed(self, encoded: Kinds, layout: Layout) -> tuple[Tensor, Tensor]:
        """The unit vectors of the dual pairs: (images [N, E], texts [N, E])."""
        images = encoded.first.images[layout.images - layout.dual :]
        return F.normalize(self.vision(images).float(), dim=-1), self.embed_texts(encoded)[: layout.dual]

    def embed_images(self, encoded: Kinds) -> Tensor:
        """The unit vectors of all pictures by themselves: [N, E]."""
        return F.normalize(self.vision(encoded.first.images).float(), dim=-1)

    def embed_texts(self, encoded: Kinds) -> Tensor:
        """The unit vectors of all texts by themselves, with a picture or without: [N, E]."""
        return F.normalize(self.language(encoded.first.texts).float(), dim=-1)

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder | None = None) -> dict[str, Tensor]:
        """-> loss and in-batch accuracy of this rank's dual pairs against all ranks' pairs."""
        images, texts = self.embed(encoded, batch.layout)
        (all_images, first), (all_texts, _) = self.gather(images), self.gather(texts)
        # The value is clamped and the gradient is not: a scale that has grown too far must find its way back.
        learned = self.logit_scale.float()
        scale = (learned + (learned.clamp(max=math.log(MAX_SCALE)) - learned).detach()).exp()
        own = torch.arange(first, first + len(images), device=images.device)
        to_text, to_image = scale * images @ all_texts.T, scale * texts @ all_images.T
        loss = (F.cross_entropy(to_text, own) + F.cross_entropy(to_image, own)) / 2
        return {
            "loss": loss,
            "accuracy/image_to_text": (to_text.detach().argmax(-1) == own).float().mean(),
            "accuracy/text_to_image": (to_image.detach().argmax(-1) == own).float().mean(),
            "logit_scale": scale.detach().squeeze(),
        }

    def after_step(self) -> None:
        """Nothing moves between steps."""
