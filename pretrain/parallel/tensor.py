"""Tensor parallelism (Megatron-LM, arXiv 1909.08053, section 3): each matrix is split into one part per rank.

The linear layers and the embedding are Megatron's (megatron_layers.py), the cross-entropy is that of one device
(pretrain/cross_entropy.py). This file has what Megatron lacks: a norm over a split dimension, and a split of values by
heads. Between the split layers every rank of the group holds the same rows, so that activations there, and gradients of
parameters that are not split, are the same numbers on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.distributed import all_gather, gather_own, visit_ranks
from pretrain.layers import Layers
from pretrain.parallel.engine import gathered, whole_init
from pretrain.parallel.mesh import Axis, Mesh
from pretrain.parallel.sequence import over_rows


def parallel_layers(mesh: Mesh) -> Layers:
    """The layers of a model on `mesh`: split over its tensor ranks, with rows divided among its sequence ranks, and
    `gather` and `visit` over its data ranks. A split parameter is marked by Megatron's attributes
    `tensor_model_parallel` and `partition_dim`."""
    group = mesh.data.group
    layers = Layers(gather=_alone, visit=_visit_alone, whole=whole_init, gathered=gathered)
    if mesh.data.size > 1:
        layers = layers._replace(gather=partial(gather_own, group=group), visit=partial(visit_ranks, group=group))
    if mesh.tensor.size > 1:
        layers = _split(layers, mesh.tensor)
    return layers if mesh.sequence.size == 1 else over_rows(layers, mesh.sequence)


def _split(layers: Layers, tensor: Axis) -> Layers:
    from pretrain.parallel import megatron_layers as split  # an optional dependency

    config = split.layer_config(tensor.size)
    return layers._replace(
        column=partial(split.Column, tensor=tensor, config=config),
        row=partial(split.Row, tensor=tensor, config=config),
        inner_norm=partial(SplitNorm, tensor=tensor),
        vocabulary=partial(split.Vocabulary, tensor=tensor, config=config),
        classifier=partial(split.Classifier, tensor=tensor, config=config),
        own_heads=partial(own_heads, tensor=tensor),
    )


class SplitNorm(nn.Module):
    """`nn.LayerNorm` over a last dimension of which this rank holds a slice."""

    def __init__(self, dim: int, *, eps: float = 1e-5, tensor: Axis):
        super().__init__()
        assert dim % tensor.size == 0, (dim, tensor.size)
        self.dim, self.eps, self.tensor = dim, eps, tensor
        self.weight = mark_split(nn.Parameter(torch.ones(dim // tensor.size)), 0)
        self.bias = mark_split(nn.Parameter(torch.zeros(dim // tensor.size)), 0)

    def forward(self, x: Tensor) -> Tensor:
        return _SplitNorm.apply(x, self.weight, self.bias, self.eps, self.tensor)


class _SplitNorm(torch.autograd.Function):
    """One collective in each pass. The slices' means and variances are combined as in Chan et al. (1983, equation 1.5),
    which is as exact as two passes over the whole row; adding up sums of squares would not be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, tensor: Axis) -> Tensor:
        own = x.float().mean(-1)
        variance = (x.float() - own.unsqueeze(-1)).square_().mean(-1)
        means, variances = torch.stack(all_gather(torch.stack([own, variance]), tensor.group)).unbind(1)  # [ranks, ...]
        mean = means.mean(0)
        scale = (variances + (means - mean).square()).mean(0).add_(eps).rsqrt_().unsqueeze(-1)
        mean = mean.unsqueeze(-1)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.tensor = tensor
        normal = (x.float() - mean).mul_(scale)
        return normal.mul_(weight.float()).add_(bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        grad, normal = grads[0].float(), (x.float() - mean).mul_(scale)
        rows = tuple(range(grad.dim() - 1))
        weight_grad, bias_grad = (grad * normal).sum(rows), grad.sum(rows)
        grad = grad * weight.float()
        # The means over the whole row of the gradient and of its product with the normalised row.
        means = torch.stack([grad.mean(-1), (grad * normal).mean(-1)]) / ctx.tensor.size
        dist.all_reduce(means, group=ctx.tensor.group)
        grad_mean, product_mean = means.unsqueeze(-1).unbind(0)
        x_grad = grad.sub_(grad_mean).sub_(normal.mul_(product_mean)).mul_(scale).to(x.dtype)
        return x_grad, weight_grad.to(weight.dtype), bias_grad.to(weight.dtype), None, None


def own_heads(values: Tensor, *, tensor: Axis) -> Tensor:
    """[..., heads], the same on every rank -> [..., heads of this rank]; the backward pass gathers all ranks'
    gradients."""
    return _OwnHeads.apply(values, tensor)


class _OwnHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, tensor: Axis) -> Tensor:
        ctx.tensor = tensor
        return values.chunk(tensor.size, -1)[tensor.rank].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat(all_gather(grads[0], ctx.tensor.group), -1), None


def mark_split(parameter: nn.Parameter, dim: int) -> nn.Parameter:
    """Marks a parameter as split along `dim`, by Megatron's attributes; so DeepSpeed counts it in the gradient norm on
    every tensor rank."""
    marked: Any = parameter
    marked.tensor_model_parallel, marked.partition_dim, marked.partition_stride = True, dim, 1
    return parameter


def _alone(rows: Tensor) -> tuple[Tensor, int]:
    return rows, 0


def _visit_alone(rows: Tensor, see: Callable[[Tensor, int], Tensor | None]) -> Tensor | None:
    return see(rows, 0)
