"""Flip and colour jitter of a whole batch on its device, as the loader's workers do them picture by picture.

A worker spends a fifth of its time on them. Their random numbers come from each sample's own generator in both cases,
so that the results are equal, except that rounding changes one value in a hundred thousand by one level of 255.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.batch import Batch

# A row of Batch.looks: whether it is flipped (0 or 1); the factors of brightness, contrast and saturation; the order in
# which these three are applied.
LOOK = 7
AS_IT_IS = (0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 2.0)
_CONTRAST, _SATURATION = 1, 2
# Rec. 601's weights of red, green and blue in a grey value, in 2**15, as OpenCV rounds them.
_GREY, _BITS = (9798, 19235, 3735), 15
# How many pictures are processed at once: their values take 8 bytes each, several times over.
_PART = 64


def finished(batch: Batch) -> Batch:
    """The batch with its pictures flipped and jittered as `looks` says, on their device, without waiting for it."""
    if batch.looks is None:
        return batch
    parts = zip(batch.images.split(_PART), batch.looks.split(_PART), strict=True)
    return batch.with_pictures(torch.cat([jittered(*part) for part in parts]) if len(batch.images) else batch.images)


def jittered(images: Tensor, looks: Tensor) -> Tensor:
    """uint8 [N, 3, H, W], float64 [N, LOOK] -> uint8 [N, 3, H, W]: flipped, then three blends, each rounded to whole
    levels: with black (brightness), with the mean of the grey values (contrast), with the grey values (saturation)."""
    flip, factors, order = looks[:, 0], looks[:, 1:4], looks[:, 4:].long()
    images = torch.where((flip > 0)[:, None, None, None], images.flip(-1), images)
    for step in order.unbind(1):
        factor = factors.gather(1, step[:, None])
        rest = 1 - factor
        grey = _grey(images)
        # A sum of whole numbers is exact in any order.
        mean = grey.sum((1, 2, 3))[:, None] / grey[0].numel()
        offset = torch.where((step == _CONTRAST)[:, None], mean * rest, 0)
        share = torch.where((step == _SATURATION)[:, None], rest, 0)
        factor, offset, share = (value.float()[:, :, None, None] for value in (factor, offset, share))
        # In 64 bits, then rounded to 32, as by a fused multiply-add: later factors would turn two more roundings into
        # whole levels.
        blend = (images.double() * factor).add_(grey.float() * share + offset)
        images = blend.float().round_().clamp_(0, 255).to(torch.uint8)
    return images


def _grey(images: Tensor) -> Tensor:
    """int64 [N, 1, H, W], rounded."""
    red, green, blue = (part.int() * weight for part, weight in zip(images.split(1, dim=1), _GREY, strict=True))
    return (red.add_(green).add_(blue).add_(1 << _BITS - 1) >> _BITS).long()
