"""The loss of a linear head over a vocabulary, without ever holding the logits of all rows.

Rows go through head and softmax a chunk at a time, and their gradients are computed in the same pass, as in Liger's
fused linear cross-entropy (arXiv 2410.10989): no product is computed twice, and under ZeRO-3 the weight is gathered
once. The price is that the weight of each row's loss must be known beforehand. torch 2.13's linear_cross_entropy does
the same, but returns neither each row's loss nor its best class, and cannot split the vocabulary over ranks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.distributed import all_gather

# Logits of a chunk, 256 MiB in fp32: enough rows (1024 of 64k classes) for matrix products at full speed, and few
# enough chunks that adding up the weight's gradient costs little.
CHUNK = 2**26


class Scored(NamedTuple):
    """What `linear_cross_entropy` returns."""

    total: Tensor  # fp32 []: the sum of weights * losses; the only one that has a gradient
    losses: Tensor  # fp32 [R]
    best: Tensor  # int64 [R]: the class with the highest logit, the first of equal ones


def linear_cross_entropy(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    *,
    classes: int,
    group: dist.ProcessGroup | None = None,
    smoothing: float = 0.0,
) -> Scored:
    """Cross-entropy of the head `weight` [C, D], `bias` [C] on `rows` [R, D] against `targets` int64 [R], each row's
    loss times `weights` [R]. With a `group` all ranks have the same rows, and each holds C consecutive classes, in rank
    order. Only the first `classes` are real; the others are padding. `smoothing`: the share of each target that is
    spread evenly over all classes (Szegedy et al., arXiv 1512.00567, section 7). At most CHUNK logits are held at
    once."""
    training = torch.is_grad_enabled()
    return Scored(*_LinearCrossEntropy.apply(rows, weight, bias, targets, weights, classes, group, smoothing, training))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        classes: int,
        group: dist.ProcessGroup | None,
        smoothing: float,
        training: bool,
    ) -> tuple[Tensor, ...]:
        count = max(CHUNK // len(weight), 1)
        wanted = [training and needed for needed in ctx.needs_input_grad[:3]]
        first = 0 if group is None else dist.get_rank(group) * len(weight)
        sums = _Gradients(rows, weight, bias, wanted, several=len(rows) > count)
        losses, best = torch.empty(len(rows), device=rows.device), torch.empty_like(targets)
        for start in range(0, len(rows), count):
            part = slice(start, start + count)
            logits = F.linear(rows[part], weight, bias)
            dtype, logits = logits.dtype, logits.float()
            real = min(max(classes - first, 0), len(weight))
            if real < len(weight):
                logits[:, real:] = -math.inf
            even = smoothing / classes
            losses[part], best[part] = _score(logits, targets[part] - first, first, group, real, smoothing, even)
            if any(wanted):
                sums.add(part, logits.mul_(weights[part].unsqueeze(1)), dtype)
        if group is not None and sums.rows is not None:
            dist.all_reduce(sums.rows, group=group)
        ctx.save_for_backward(*sums.results())
        ctx.mark_non_differentiable(losses, best)
        return (losses * weights).sum(), losses, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a copy of the weight's gradient would be as large as the weight. torch refuses a second backward
        # pass, which would multiply once more.
        ready = (None if grad is None else grad.mul_(grads[0]) for grad in ctx.saved_tensors)
        return (*ready, None, None, None, None, None, None)


def _score(
    logits: Tensor,
    own: Tensor,
    first: int,
    group: dist.ProcessGroup | None,
    real: int,
    smoothing: float,
    even: float,
) -> tuple[Tensor, Tensor]:
    """Losses [r] and best classes [r] of fp32 `logits` [r, C], which are overwritten with the gradient of each row's
    loss. `own` [r]: the targets, counted from this rank's `first` class; some belong to other ranks. The first `real`
    classes are not padding. In the target distribution each class has the probability `even`, and the target's class
    1 - `smoothing` more."""
    top, best = logits.max(-1)
    hit = torch.ones_like(own, dtype=torch.float32)
    if group is not None:
        top, best = join_best(top, best + first, group)
        hit = ((own >= 0) & (own < logits.shape[1])).float()
        own = own.clamp(0, logits.shape[1] - 1)
    own = own.unsqueeze(1)
    logits.sub_(top.unsqueeze(1))
    target = logits.gather(1, own).squeeze(1)
    if group is not None:
        target = torch.where(hit > 0, target, 0.0)
    if smoothing:
        target = (1 - smoothing) * target + even * logits[:, :real].sum(-1)
    total = logits.exp_().sum(-1)
    if group is not None:
        both = torch.stack([total, target])
        dist.all_reduce(both, group=group)
        total, target = both.unbind(0)
    logits.mul_(total.reciprocal().unsqueeze(1))
    # scatter_ and not scatter_add_, which torch refuses on a GPU under `deterministic`; each row has one target.
    logits.scatter_(1, own, logits.gather(1, own) + (smoothing - 1) * hit.unsqueeze(1))
    if smoothing:
        logits[:, :real] -= even
    return total.log() - target, best


def join_best(top: Tensor, best: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The highest logit [r] among all ranks' and its class [r]; of equal ones the first, as argmax on one device."""
    # As fp32 in one collective: exact up to 16 million classes.
    tops, places = torch.stack(all_gather(torch.stack([top, best.float()]), group)).unbind(1)
    top, rank = tops.max(0)
    return top, places.gather(0, rank.unsqueeze(0)).squeeze(0).long()


class _Gradients:
    """The gradients of Scored.total for rows, weight and bias, those of them that are `wanted`. Over `several` chunks
    the weight's is added up in fp32."""

    def __init__(self, rows: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool], *, several: bool):
        self.of, self.several = (rows, weight, bias), several
        self.rows = torch.zeros_like(rows) if wanted[0] else None
        self.weight: Tensor | None = None  # made by the first chunk: zeros would be written for nothing
        self.wants_weight = wanted[1]
        self.bias = torch.zeros_like(weight[:, 0], dtype=torch.float32) if bias is not None and wanted[2] else None

    def add(self, part: slice, logits: Tensor, dtype: torch.dtype) -> None:
        """Adds a chunk. `logits`: the gradient of the logits of the rows `part`; products are computed in `dtype`."""
        rows, weight, _ = self.of
        if self.bias is not None:
            self.bias += logits.sum(0)
        logits = logits.to(dtype)
        if self.rows is not None:
            self.rows[part] = logits @ weight.to(dtype)
        if self.wants_weight:
            product = logits.T @ rows[part].to(dtype)
            if self.weight is None:
                self.weight = product.float() if self.several else product
            else:
                self.weight.add_(product)

    def results(self) -> list[Tensor | None]:
        if self.wants_weight and self.weight is None:  # there are no rows
            self.weight = torch.zeros_like(self.of[1])
        return [
            None if grad is None or like is None else grad.to(like.dtype)
            for grad, like in zip((self.rows, self.weight, self.bias), self.of, strict=True)
        ]
