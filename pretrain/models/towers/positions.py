"""Makes a tower's learned positions fit another picture size or text length than they were trained with."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.multiway.resize import resize_square


def resize_positions(table: Tensor, grid: int, first: int) -> Tensor:
    """[..., first + old_grid**2, dim] -> [..., first + grid**2, dim], by bicubic interpolation; the `first` rows (a
    class row's position) stay."""
    flat = table.reshape(-1, table.shape[-1])
    stays, patches = flat[:first], flat[first:].float()
    if len(patches) == grid * grid:
        return table
    new = torch.cat([stays, resize_square(patches, grid).to(table.dtype)])
    return new.reshape(*table.shape[:-2], *new.shape).contiguous()


def cut_positions(table: Tensor, length: int) -> Tensor:
    """[positions, dim] -> [length, dim]: the first ones."""
    return table[:length].contiguous()
