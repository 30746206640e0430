"""Makes weights fit another number of patches or of words than they were trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_patch_positions(table: Tensor, grid: int, new_grid: int) -> Tensor:
    """[1 + grid * grid, dim] -> [1 + new_grid * new_grid, dim]: the grid is interpolated (bicubic), its class row
    stays, as unilm's beit3/utils.py does."""
    first, patches = table.float().split([1, grid**2])
    return torch.cat([first, resize_square(patches, new_grid)]).to(table.dtype).contiguous()


def resize_relative_positions(table: Tensor, grid: int, new_grid: int) -> Tensor:
    """The same for RelativePosition's table, whose first (2 grid - 1)**2 rows are the offsets of two patches. Bicubic,
    as for positions; BEiT's own code interpolates on a geometric grid instead."""
    offsets = (2 * grid - 1) ** 2
    patches, rest = table.float().split([offsets, len(table) - offsets])
    return torch.cat([resize_square(patches, 2 * new_grid - 1), rest]).to(table.dtype).contiguous()


def grow_vocabulary(table: Tensor, size: int) -> Tensor:
    """[words, ...] -> [size, ...]: a new word begins as the mean of the old ones, as transformers'
    resize_token_embeddings does."""
    new = table.float().mean(0, keepdim=True).to(table.dtype)
    return torch.cat([table, new.expand(size - len(table), *table.shape[1:])]).contiguous()


def resize_square(rows: Tensor, side: int) -> Tensor:
    """[old_side**2, D] -> [side**2, D]: bicubic interpolation of rows that stand for a square, in raster order."""
    old = round(len(rows) ** 0.5)
    square = rows.T.reshape(1, -1, old, old)
    return F.interpolate(square, size=(side, side), mode="bicubic", align_corners=False).flatten(2)[0].T
