"""Classes of pictures, as BEiT-3 is fine-tuned for ImageNet (arXiv 2208.10442, 3.2; unilm beit3/modeling_finetune.py,
BEiT3ForImageClassification): the mean of the patches' rows, a norm, a linear layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Encoder, Objective
from pretrain.data.mixing import LABEL, OTHER, SHARE
from pretrain.flops import Product
from pretrain.layers import HEAD_STD, PLAIN, Layers, Linear

SCALE = 0.001  # by which unilm multiplies the last layer's initial weights


@dataclass(frozen=True)
class ImageClassification(Objective):
    """For pictures of the mix's `images`, from LabelledShards with as many `classes`. `smoothing`: the share of each
    target that is spread evenly over all classes. unilm's checkpoints are of models with final_norm=False; where the
    encoder is trained too that matters little, but a linear probe (trainable=("objectives.*",)) needs the norm."""

    classes: int = 1000
    smoothing: float = 0.1
    name = "classification"

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"classification.classes={self.classes} is below 2; use the number of labels.json")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"classification.smoothing={self.smoothing} is not a share; use at least 0, less than 1")

    def build(self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: Any = None) -> nn.Module:
        return ClassificationHead(model.width("images"), self.classes, self.smoothing)

    def problems(self, stage: Any) -> list[str]:
        there = getattr(stage.mix.get("images"), "classes", None)
        if there is None:
            return ["classification needs labels; give the mix images=LabelledShards(...)"]
        if there != self.classes:
            return [f"classification.classes={self.classes} but mix.images.classes={there}; use one number"]
        return []

    def products(self, layout: Layout, model: Any) -> list[Product]:
        return [Product(layout.images, model.width("images"), self.classes, classes=True)]


class ClassificationHead(nn.Module):
    """A norm and a linear layer on the mean of the patches' rows."""

    def __init__(self, width: int, classes: int, smoothing: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.classes = Linear(width, classes, std=HEAD_STD * SCALE, cut=math.inf)
        self.smoothing = smoothing

    def needed_rows(self, batch: Batch) -> Kinds:
        """The patches of images."""
        rows = Kinds.rows_of(batch.layout, batch.images.device)
        rows.images[: _alone(batch), 1:] = True
        return rows

    def logits(self, encoded: Kinds) -> Tensor:
        """-> [images, classes]"""
        return self.classes(self.norm(encoded.images[:, 1:].mean(1)))

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder | None = None) -> dict[str, Tensor]:
        """-> `loss`, the cross-entropy with blended targets where pictures are blended, and `accuracy/classification`
        against each picture's own class."""
        # Pictures of dual pairs have no class. Labels of other kinds, if any, come behind those of the images.
        logits = self.logits(encoded)[: _alone(batch)].float()
        label = batch.extra[LABEL][: len(logits)]
        accuracy = (logits.detach().argmax(-1) == label).float().mean()
        if OTHER in batch.extra:
            # The targets are blended like the pictures, each of the two smoothed.
            share, other = batch.extra[SHARE].float(), batch.extra[OTHER]
            own = F.cross_entropy(logits, label, label_smoothing=self.smoothing, reduction="none")
            partner = F.cross_entropy(logits, other, label_smoothing=self.smoothing, reduction="none")
            loss = (share * own + (1 - share) * partner).mean()
        else:
            loss = F.cross_entropy(logits, label, label_smoothing=self.smoothing)
        return {"loss": loss, "accuracy/classification": accuracy}

    def after_step(self) -> None:
        """Nothing moves between steps."""


def _alone(batch: Batch) -> int:
    """Pictures of the mix's `images`."""
    return batch.layout.images - batch.layout.dual


def label_problems(stage: Any, kind: str, name: str) -> list[str]:
    """Why an objective called `name`, which reads the labels of a kind, could take those of another one for its own."""
    gives = [
        other
        for other, source in stage.mix.items()
        if hasattr(source, "classes") or getattr(source, "pictures", 1) == 2
    ]
    return [
        f"mix.{other} has labels beside mix.{kind}, whose labels {name} reads; give mix.{other} a source without any"
        for other in gives
        if other != kind
    ]


def two_layers(inputs: int, hidden: int, outputs: int, *, scale: float = 1.0) -> nn.Sequential:
    """Linear, norm, GELU, linear: the head of Answering and Reasoning. `scale` multiplies the initial weights."""
    std, cut = HEAD_STD * scale, math.inf
    first = Linear(inputs, hidden, std=std, cut=cut), nn.LayerNorm(hidden), nn.GELU()
    return nn.Sequential(*first, Linear(hidden, outputs, std=std, cut=cut))


def answered(logits: Tensor, label: Tensor, name: str) -> dict[str, Tensor]:
    """`loss`, the cross-entropy of logits [n, classes] against int64 [n], and `accuracy/NAME`."""
    accuracy = (logits.detach().argmax(-1) == label).float().mean()
    return {"loss": F.cross_entropy(logits.float(), label), f"accuracy/{name}": accuracy}


def first_rows(batch: Batch, *, texts: bool = False) -> Kinds:
    """The class row of each pair's picture, and with `texts` the first row of its text."""
    rows = Kinds.rows_of(batch.layout, batch.images.device)
    rows.pair_images[:, :1] = True
    if texts:
        rows.pair_texts[:, :1] = True
    return rows
