"""The row that stands for a pair, from the row that stands for its picture and the one that stands for its text."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.layers import Linear

KINDS = ("mlp", "gated", "bilinear")


class PooledFusion(nn.Module):
    """From a picture's row v and a text's row t, by `kind`:

    mlp: W gelu(U [v, t]), the hidden layer as wide as the output.
    gated: z tanh(V v) + (1 - z) tanh(T t), z = sigmoid(Z [v, t]) (the gated multimodal unit, arXiv 1702.01992, 3.1).
    bilinear: relu(V v) * relu(T t): the low-rank bilinear pooling of arXiv 1610.04325 with ViLBERT's activation
    (arXiv 1908.02265, 3.1: "an element-wise product"; its code has a linear layer and a ReLU before it). The pooling's
    output matrix is left to the head that reads the row.
    """

    def __init__(self, kind: str, image_dim: int, text_dim: int, dim: int, *, std: float = 0.02):
        super().__init__()
        check_kind(kind, "kind")
        linear = partial(Linear, std=std, cut=math.inf)
        self.kind = kind
        self.joint = linear(image_dim + text_dim, dim) if kind in ("mlp", "gated") else None
        self.image = None if kind == "mlp" else linear(image_dim, dim)
        self.text = None if kind == "mlp" else linear(text_dim, dim)
        self.out = linear(dim, dim) if kind == "mlp" else None

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """[N, image_dim], [N, text_dim] -> [N, dim]"""
        joint = None if self.joint is None else self.joint(torch.cat([image, text], -1))
        if self.image is None or self.text is None:
            assert joint is not None and self.out is not None
            return self.out(F.gelu(joint))
        if joint is None:
            return F.relu(self.image(image)) * F.relu(self.text(text))
        gate = joint.sigmoid()
        return gate * self.image(image).tanh() + (1 - gate) * self.text(text).tanh()


def check_kind(kind: str, knob: str) -> None:
    """ValueError, naming the model's field `knob`, for a kind that PooledFusion does not know."""
    if kind not in KINDS:
        raise ValueError(f"model.{knob}={kind!r} is unknown; use {', '.join(KINDS)}")
