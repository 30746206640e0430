"""Image-text contrast over the whole data-parallel batch: BEiT-3's intermediate fine-tuning for retrieval (App. A), or
with loss="sigmoid" SigLIP's (arXiv 2303.15343)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout, make_batch
from pretrain.contracts import Encoder, Objective
from pretrain.flops import Product
from pretrain.layers import PLAIN, Head, Layers
from pretrain.objectives.pairwise_sigmoid import pairwise_sigmoid

MAX_SCALE = 100.0  # CLIP (arXiv 2103.00020, 2.5): "clipped to prevent scaling the logits by more than 100"
CLIP_TEMPERATURE = 0.07
# SigLIP begins near the prior that almost no image and text of a batch are a pair. Its scale is not bounded: those of
# released models are above 100.
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0


@dataclass(frozen=True)
class Contrastive(Objective):
    """Contrast of class rows and BOS rows. `embed_dim` None keeps the model's width, as BEiT-3 does. `loss`: softmax
    over the batch, or sigmoid, which decides for each image and text separately whether they are a pair (SigLIP).
    `project` False compares the rows as they are, which must then be of one width."""

    embed_dim: int | None = None
    temperature: float = CLIP_TEMPERATURE  # the softmax's initial one; it is learned. The sigmoid begins as SigLIP's
    loss: str = "softmax"
    project: bool = True
    # The sigmoid's initial bias; it is learned. SigLIP's is near -log(32k), for its batch of 32k, in which one of 32k
    # texts belongs to a picture. A small batch wants -log of its own size: far from it, the first steps make all
    # pictures' vectors alike.
    bias: float = SIGMOID_BIAS
    projection_bias: bool = False  # whether the projections have a bias, as ALBEF's and BLIP's
    smoothing: float = 0.0  # the share of a softmax target that is spread evenly over all; ALIGN's is 0.1
    name = "contrastive"

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"objectives: temperature={self.temperature} must be above 0; CLIP begins with 0.07")
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"contrastive.loss={self.loss!r} is unknown; use softmax or sigmoid")
        if not self.project and self.embed_dim is not None:
            raise ValueError(f"contrastive.embed_dim={self.embed_dim} is a projection's and project=False has none")
        if not self.project and self.projection_bias:
            raise ValueError("contrastive.projection_bias=True is a projection's and project=False has none; set False")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"contrastive.smoothing={self.smoothing} is no share; use at least 0 and less than 1")
        if self.loss == "sigmoid" and self.smoothing:
            raise ValueError(f"contrastive.smoothing={self.smoothing} is the softmax's; set 0, or use loss='softmax'")
        if self.loss != "sigmoid" and self.bias != SIGMOID_BIAS:
            raise ValueError(f"contrastive.bias={self.bias} is the sigmoid's; leave it out, or use loss='sigmoid'")
        if self.loss == "sigmoid" and self.temperature != CLIP_TEMPERATURE:
            raise ValueError(
                f"contrastive.temperature={self.temperature} does not go with loss='sigmoid', which begins at SigLIP's "
                f"scale {SIGMOID_SCALE:g}; leave temperature out, or use loss='softmax'"
            )

    def build(
        self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: nn.Parameter | None = None
    ) -> ContrastiveHead:
        images, texts = self._width(model)
        if not self.project and images != texts:
            raise ValueError(
                f"contrastive.project=False compares rows as they are, and pictures have a width of {images} and texts "
                f"of {texts}; set project=True, or give one of the towers a projection"
            )
        options: Any = {"bias": self.bias if self.loss == "sigmoid" else None, "project": self.project}
        options |= {"projection_bias": self.projection_bias, "smoothing": self.smoothing}
        return ContrastiveHead((images, texts), self.embed_dim, self.temperature, layers, **options)

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
        if not self.project:
            return []
        return [
            Product(layout.dual, images, self.embed_dim or images),
            Product(layout.dual, texts, self.embed_dim or images),
        ]

    def _width(self, model: Any) -> tuple[int, int]:
        return model.width("images"), model.width("texts")


class ContrastiveHead(nn.Module):
    """Linear projections (without bias, as in unilm's beit3 BEiT3ForRetrieval, unless `projection_bias`) and a learned
    logit scale; for the sigmoid, where `bias` is not None, also a learned logit bias that begins there. `widths`: of
    image rows and of text rows."""

    def __init__(
        self,
        widths: tuple[int, int],
        embed_dim: int | None,
        temperature: float,
        layers: Layers = PLAIN,
        *,
        bias: float | None = None,
        project: bool = True,
        projection_bias: bool = False,
        smoothing: float = 0.0,
    ):
        super().__init__()
        images, texts = widths
        self.smoothing = smoothing
        self.width = embed_dim or images  # E of the unit vectors
        self.vision = Head(images, self.width, bias=projection_bias) if project else nn.Identity()
        self.language = Head(texts, self.width, bias=projection_bias) if project else nn.Identity()
        self.gather, self.visit = layers.gather, layers.visit
        # One element and not a scalar: ZeRO-3 partitions by rows.
        start = math.log(1 / temperature if bias is None else SIGMOID_SCALE)
        self.logit_scale = nn.Parameter(torch.full((1,), start))
        self.logit_bias = nn.Parameter(torch.full((1,), bias)) if bias is not None else None

    def needed_rows(self, batch: Batch) -> Kinds:
        """The class row of each image and the first row of each text of a dual pair."""
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
        """-> loss and in-batch accuracy of this rank's dual pairs against all ranks' pairs. The sigmoid never holds all
        images beside a text, so it reports the accuracy from image to text only."""
        images, texts = self.embed(encoded, batch.layout)
        return self._softmax(images, texts) if self.logit_bias is None else self._sigmoid(images, texts)

    def _softmax(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        (all_images, first), (all_texts, _) = self.gather(images), self.gather(texts)
        scale = self.scale()
        own = torch.arange(first, first + len(images), device=images.device)
        to_text, to_image = scale * images @ all_texts.T, scale * texts @ all_images.T
        losses = [F.cross_entropy(each, own, label_smoothing=self.smoothing) for each in (to_text, to_image)]
        return {
            "loss": torch.stack(losses).mean(),
            "accuracy/image_to_text": (to_text.detach().argmax(-1) == own).float().mean(),
            "accuracy/text_to_image": (to_image.detach().argmax(-1) == own).float().mean(),
            "logit_scale": scale.detach().squeeze(),
        }

    def scale(self) -> Tensor:
        """[1]: the factor by which the loss multiplies cosines; that of the softmax has an upper bound."""
        learned = self.logit_scale.float()
        if self.logit_bias is not None:
            return learned.exp()
        # The value is clamped and the gradient is not: a scale that has grown too far must find its way back.
        return (learned + (learned.clamp(max=math.log(MAX_SCALE)) - learned).detach()).exp()

    def _sigmoid(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        assert self.logit_bias is not None
        scale, bias = self.scale(), self.logit_bias.float()
        answered = pairwise_sigmoid(images, texts, scale, bias, self.visit)
        own = torch.arange(len(images), device=images.device)
        return {
            "loss": answered.loss,
            "accuracy/image_to_text": (answered.best == own).float().mean(),
            "logit_scale": scale.detach().squeeze(),
            "logit_bias": bias.detach().squeeze(),
        }

    def after_step(self) -> None:
        """Nothing moves between steps."""


def paired(layout: Layout) -> Layout:
    """The layout of its dual pairs alone."""
    count = layout.dual
    return Layout(images=count, texts=count, patches=layout.patches, text_len=layout.text_len, dual=count)


def dual_pairs(batch: Batch) -> Batch:
    """Its dual pairs alone, with no patch or word hidden: what a teacher reads, by way of batch.derived."""
    layout = batch.layout
    images = batch.images[layout.images - layout.dual : layout.images]
    return make_batch(paired(layout), images=images, text_tokens=batch.text_tokens[: layout.dual])
