"""An attentive probe: one learned query attends to a picture's frozen rows, and a linear layer classifies the result
(CAE, arXiv 2202.03026; V-JEPA, arXiv 2404.08471, whose probe has a feed-forward network too)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, RATE, DECAY = 256, 3e-3, 0.05
MOST_BYTES = 8 << 30  # of all pictures' rows, which are held for all epochs
HEAD_WIDTH = 64


class Rows(NamedTuple):
    """The frozen rows of pictures, bf16 [N, L, D], and their classes, int64 [N]."""

    rows: Tensor
    label: Tensor


def check_size(pictures: int, length: int, width: int) -> None:
    """ValueError for more rows than the host should hold."""
    if (need := 2 * pictures * length * width) > MOST_BYTES:
        raise ValueError(
            f"evals: the rows of {pictures} pictures take {need >> 30} GiB for the attentive probe, more than "
            f"{MOST_BYTES >> 30}; set samples={MOST_BYTES // (2 * length * width)} of Probe, or attentive=0"
        )


class Attentive(nn.Module):
    """float [N, L, D] -> [N, classes]."""

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.heads = max(width // HEAD_WIDTH, 1)
        while width % self.heads:
            self.heads -= 1
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.norm, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.classes = nn.Linear(width, classes)

    def forward(self, rows: Tensor) -> Tensor:
        rows = self.norm(rows)
        asked = self.query.expand(len(rows), 1, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (asked, self.key(rows), self.value(rows)))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.classes(self.after(self.out(seen)[:, 0]))


@torch.enable_grad()
def attentive_answers(train: Rows, test: Tensor, classes: int, epochs: int, seed: int = 0) -> Tensor:
    """int64 [M]: the classes that the probe predicts for `test` [M, L, D] after `epochs` epochs of `train`. Its order
    and its initial weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Attentive(train.rows.shape[-1], classes)
    drawn = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=RATE, weight_decay=DECAY)
    steps, step = epochs * math.ceil(len(train.rows) / BATCH), 0
    for _ in range(epochs):
        for some in torch.randperm(len(train.rows), generator=drawn).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
            loss = F.cross_entropy(probe(train.rows[some].float()), train.label[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    with torch.no_grad():
        return torch.cat([probe(some.float()).argmax(-1) for some in test.split(BATCH)])
