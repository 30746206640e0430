"""A tower's learned positions for another picture or text length than they were trained with."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.models.multiway.resize import resize_square


def resize_positions(table: Tensor, grid: int, first: int) -> Tensor:
    """[..., first + old grid * old grid, dim] -> [..., first + grid * grid, dim]: bicubic, row by row of the square;
    `first` rows (a class row's) stay."""
    flat = table.reshape(-1, table.shape[-1])
    stays, patches = flat[:first], flat[first:].float()
    if len(patches) == grid * grid:
        return table
    new = torch.cat([stays, resize_square(patches, grid).to(table.dtype)])
    return new.reshape(*table.shape[:-2], *new.shape).contiguous()


def cut_positions(table: Tensor, length: int) -> Tensor:
    """[rows, dim] -> the first `length` of them."""
    return table[:length].contiguous()
