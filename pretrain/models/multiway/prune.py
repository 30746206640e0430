"""Pruning of a trained Multiway encoder: zeros for the smallest entries of its matrices, or fewer heads in a block."""

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
    """The tensors, with the smallest `share` of the entries of each of the blocks' matrices set to 0 (magnitude
    pruning, arXiv 1506.02626). Their sizes stay, and no kernel here skips zeros: this saves space only in a compressed
    file. ValueError for a `share` that is not between 0 and 1."""
    if not 0 < share < 1:
        raise ValueError(f"--zeros {share} is no share of the weights; use more than 0 and less than 1, such as 0.5")
    pruned = dict(state)
    for name, value in state.items():
        if MATRIX.fullmatch(name) and value.ndim == 2:
            least = value.abs().flatten().float().kthvalue(max(round(share * value.numel()), 1)).values
            pruned[name] = value.masked_fill(value.abs() <= least, 0)
    return pruned


def keep_heads(state: Mapping[str, Tensor], cfg: MultiwayConfig, heads: int) -> tuple[State, MultiwayConfig]:
    """The tensors and the configuration of the same model with `heads` heads in each block. The heads that stay are
    those that can change the rows most: with the largest norm of value projection times output projection. Where vision
    and language have projections of their own, a head is removed from both, since their rows attend to each other.
    ValueError for a number of heads that is not below the model's."""
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
    """int64 [heads], rising: the numbers of the heads to keep in one block."""
    norms = torch.zeros(cfg.heads)
    for name, value in state.items():
        if re.fullmatch(re.escape(prefix) + r"v\.\w+\.weight", name):
            out = state[name.replace(".v.", ".out.")].float().unflatten(1, (cfg.heads, -1))
            own = value.float().unflatten(0, (cfg.heads, -1))
            norms += torch.einsum("ohc,hcd->hod", out, own).flatten(1).norm(dim=1)
    return norms.topk(heads).indices.sort().values
