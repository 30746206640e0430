"""SigLIP's loss (arXiv 2303.15343, section 3.2): whether an image and a text are a pair is a binary classification of
its own, so that no sum over the whole batch is needed and texts can be processed a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits that are held at once, 256 MiB in fp32.
CHUNK = 2**26

Visit = Callable[[Tensor, Callable[[Tensor, int], Tensor | None]], Tensor | None]


class Answered(NamedTuple):
    """What `pairwise_sigmoid` returns."""

    loss: Tensor  # []: the mean over own images of the sum over all ranks' texts
    best: Tensor  # int64 [N]: for each image the place of the most similar text, counted from this rank's first one


def pairwise_sigmoid(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, visit: Visit) -> Answered:
    """The loss of this rank's pairs, unit vectors fp32 [N, E]; `scale` and `bias` fp32 [1]; `visit` as Layers.visit.
    The mean of the ranks' losses is the loss of the whole batch, and each rank gets the gradients of its own texts from
    all ranks. The texts of one rank and CHUNK logits are held at once, no more."""
    return Answered(*_PairwiseSigmoid.apply(images, texts, scale, bias, visit, torch.is_grad_enabled()))


class _PairwiseSigmoid(torch.autograd.Function):
    """Computes the gradients along with the loss: otherwise the backward pass would need every rank's texts again."""

    @staticmethod
    def forward(
        ctx: Any, images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor, visit: Visit, training: bool
    ) -> tuple[Tensor, Tensor]:
        count = len(images)
        loss, for_images = torch.zeros((), device=images.device), torch.zeros_like(images)
        for_scale, for_bias = torch.zeros_like(scale), torch.zeros_like(bias)
        top = torch.full((count,), -torch.inf, device=images.device)
        best = torch.zeros(count, dtype=torch.long, device=images.device)
        own = torch.arange(count, device=images.device).unsqueeze(1)

        def see(others: Tensor, distance: int) -> Tensor | None:
            back = torch.empty_like(others) if training else None
            step = max(CHUNK // max(count, 1), 1)
            for start in range(0, len(others), step):
                some = others[start : start + step]
                places = torch.arange(distance + start, distance + start + len(some), device=others.device)
                alike = images @ some.T
                sign = torch.where(own == places, 1.0, -1.0)
                answers = sign * (scale * alike + bias)
                loss.sub_(F.logsigmoid(answers).sum())
                highest, where = alike.max(-1)
                best.copy_(torch.where(highest > top, places[where], best))
                top.copy_(torch.maximum(highest, top))
                if back is not None:
                    grad = -sign * torch.sigmoid(-answers)
                    for_scale.add_((grad * alike).sum())
                    for_bias.add_(grad.sum())
                    for_images.addmm_(grad, some)
                    back[start : start + step] = scale * (grad.T @ images)
            return back

        for_texts = visit(texts, see)
        if training:
            grads = (scale * for_images, for_texts, for_scale, for_bias)
            ctx.save_for_backward(*(None if grad is None else grad / count for grad in grads))
        ctx.mark_non_differentiable(best)
        return loss / count, best

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if grad is None else grad * grads[0] for grad in ctx.saved_tensors), None, None)
