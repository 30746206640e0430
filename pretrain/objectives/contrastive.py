"""Image-text contrast over the whole data-parallel batch: BEiT-3's intermediate fine-tuning for retrieval (App. A)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Layout
from pretrain.layers import PLAIN, Head, Layers
from pretrain.models.multiway.config import MultiwayConfig

MAX_SCALE = 100.0  # CLIP (arXiv 2103.00020, 2.5): "clipped to prevent scaling the logits by more than 100"


@dataclass(frozen=True)
class Contrastive:
    """Softmax contrast of class rows and BOS rows; `embed_dim` None keeps the model's width, as BEiT-3 does."""

    embed_dim: int | None = None
    temperature: float = 0.07  # at the start; learned
    name = "contrastive"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"objectives: temperature={self.temperature} must be above 0; CLIP begins with 0.07")

    def build(
        self,
        model: MultiwayConfig,
        experts: tuple[str, ...],
        layers: Layers = PLAIN,
        tokens: nn.Parameter | None = None,
    ) -> ContrastiveHead:
        return ContrastiveHead(model.dim, self.embed_dim or model.dim, self.temperature, layers)

    def head_rows(self, layout: Layout, model: MultiwayConfig) -> list[tuple[int, int]]:
        """(rows, outputs) of the projections, for the count of FLOPs."""
        return [(layout.images + layout.texts, self.embed_dim or model.dim)]


class ContrastiveHead(nn.Module):
    """Linear projections without bias and a learned logit scale, as unilm's beit3 BEiT3ForRetrieval."""

    def __init__(self, dim: int, embed_dim: int, temperature: float, layers: Layers = PLAIN):
        super().__init__()
        self.vision = Head(dim, embed_dim, bias=False)
        self.language = Head(dim, embed_dim, bias=False)
        self.gather = layers.gather
        # One element and not a scalar: ZeRO-3 partitions by rows.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / temperature)))

    def needed_rows(self, batch: Batch) -> Tensor:
        """bool [layout.rows]: the class row of each image and the first row of each text."""
        layout = batch.layout
        needed = torch.zeros(layout.rows, dtype=torch.bool, device=batch.images.device)
        needed[: layout.image_rows : max(layout.patches, 1)] = True
        needed[layout.image_rows :: max(layout.text_len, 1)] = True
        return needed

    def embed(self, rows_TD: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows of a dual-encoder batch -> unit vectors (images [N, E], texts [N, E])."""
        layout = batch.layout
        images = rows_TD[: layout.image_rows : max(layout.patches, 1)]
        texts = rows_TD[layout.image_rows :: max(layout.text_len, 1)]
        return F.normalize(self.vision(images).float(), dim=-1), F.normalize(self.language(texts).float(), dim=-1)

    def forward(self, rows_TD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Rows of a dual-encoder batch (image i belongs to text i) -> loss and in-batch accuracy of this rank's rows
        against all ranks' rows."""
        assert batch.layout.images == batch.layout.texts and not batch.layout.pairs, batch.layout
        images, texts = self.embed(rows_TD, batch)
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
