"""Batch normalisation over all data ranks, so that a convolutional tower computes the same on any number of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Gather = Callable[[Tensor], tuple[Tensor, int]]


class GlobalBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of all data ranks' pictures, of which every rank must have the
    same number; `gather` as Layers.gather. torch's SyncBatchNorm does that on GPUs only. It takes over the weights and
    running statistics of `norm`, under their names."""

    def __init__(self, norm: nn.BatchNorm2d, gather: Gather):
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False)
        self.weight, self.bias, self.gather = norm.weight, norm.bias, gather
        for name, value in norm.named_buffers(recurse=False):
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same, normalised in fp32."""
        if not self.training:
            return super().forward(x)
        wide = x.float()
        # Two collectives, the mean first and then the deviations from it: as exact as one process over all pictures.
        mean = self._everywhere(wide.mean((0, 2, 3)))
        centred = wide - mean.view(-1, 1, 1)
        variance = self._everywhere(centred.square().mean((0, 2, 3)))
        self._remember(mean.detach(), variance.detach(), x.numel() // x.shape[1])
        normal = centred * (variance + self.eps).rsqrt().view(-1, 1, 1)
        return (normal * self.weight.float().view(-1, 1, 1) + self.bias.float().view(-1, 1, 1)).to(x.dtype)

    def _everywhere(self, own: Tensor) -> Tensor:
        """[C] -> the mean over all data ranks; its gradient comes from all of them."""
        return self.gather(own.unsqueeze(0))[0].mean(0)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, own: int) -> None:
        count = own * len(self.gather(mean.unsqueeze(0))[0])
        momentum = 0.1 if self.momentum is None else self.momentum
        for kept, new in ((self.running_mean, mean), (self.running_var, variance * count / max(count - 1, 1))):
            assert kept is not None
            # What is not finite, of a step that is skipped, is left out: it would stay, and no later start take it.
            moved = torch.lerp(kept, new.to(kept.dtype), momentum)
            kept.copy_(torch.where(moved.isfinite(), moved, kept))
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)


def over_all_ranks(module: nn.Module, gather: Gather) -> None:
    """Replaces every nn.BatchNorm2d inside `module` by a GlobalBatchNorm, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(parent, name, GlobalBatchNorm(child, gather))
