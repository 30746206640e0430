"""Less of a trained Multiway encoder: matrices with zeros where they were smallest, or blocks with fewer heads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from pretrain.contracts import State
from pretrain.models.multiway.config import MultiwayConfig

MATRIX = re.compile(r"encoder\.blocks\.\d+\.(attention|experts)\..*\.weight")
TABLE = "encoder.relative_position.table"


def zero_smallest(state: Mapping[str, Tensor], share: float) -> State:
    """The tensors with the smallest `share` of each block's matrices at 0, each matrix by itself (magnitude pruning,
    arXiv 1506.02626). They have the same size, and no kernel here skips zeros: what it saves, it saves in a file that
    is compressed. ValueError for no share."""
    if not 0 < share < 1:
        raise ValueError(f"--zeros {share} is no share of the weights; use more than 0 and less than 1, such as 0.5")
    pruned = dict(state)
    for name, value in state.items():
        if MATRIX.fullmatch(name) and value.ndim == 2:
            least = value.abs().flatten().float().kthvalue(max(round(share * value.numel()), 1)).values
            pruned[name] = value.masked_fill(value.abs() <= least, 0)
    return pruned


def keep_heads(state: Mapping[str, Tensor], cfg: MultiwayConfig, heads: int) -> tuple[State, MultiwayConfig]:
    """The tensors of the same model with `heads` heads in each block, those that can change its rows most: the largest
    by the norm of what a head's values become behind the output projection. Where vision and language have projections
    of their own, a head goes from both, since they attend together. ValueError for a number that the model has not."""
    if not 0 < heads < cfg.heads:
        raise ValueError(f"--heads {heads} is wrong: the model has {cfg.heads}; use 1 to {cfg.heads - 1}")
    pruned, table = dict(state), []
    for block in range(cfg.depth):
        prefix = f"encoder.blocks.{block}.attention."
        chosen = _largest(state, prefix, cfg, heads)
        rows = (chosen[:, None] * cfg.head_width + torch.arange(cfg.head_width)).flatten()
        for name, value in state.items():
            part = name.removeprefix(prefix).split(".")[0]
            if name.startswith(prefix) and part in ("q", "k", "v", "inner_norm"):
                pruned[name] = value[rows].clone()
            elif name.startswith(prefix) and part == "out" and value.ndim == 2:
                pruned[name] = value[:, rows].clone()
        table.append(chosen + block * cfg.heads)
    if TABLE in state:
        pruned[TABLE] = state[TABLE][:, torch.cat(table)].clone()
    return pruned, replace(cfg, heads=heads, head_dim=cfg.head_width)


def _largest(state: Mapping[str, Tensor], prefix: str, cfg: MultiwayConfig, heads: int) -> Tensor:
    """int64 [heads], rising."""
    norms = torch.zeros(cfg.heads)
    for name, value in state.items():
        if re.fullmatch(re.escape(prefix) + r"v\.\w+\.weight", name):
            out = state[name.replace(".v.", ".out.")].float().unflatten(1, (cfg.heads, -1))
            own = value.float().unflatten(0, (cfg.heads, -1))
            norms += torch.einsum("ohc,hcd->hod", out, own).flatten(1).norm(dim=1)
    return norms.topk(heads).indices.sort().values
