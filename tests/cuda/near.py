"""How numbers in bf16 are judged: by those of fp32, and by how far another way in bf16 is from these."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Numbers = Iterable[Tensor]


def judged(module: nn.Module) -> list[nn.Parameter]:
    """The parameters whose gradients can be compared: all but the biases of keys. Such a bias adds the same to all
    scores of a query, which the softmax takes away again: its gradient is zero, and what one sees of it is rounding,
    which no two ways share (tests/models/test_attention.py)."""
    return [value for name, value in module.named_parameters() if ".attention.k." not in name or "bias" not in name]


def away(ours: Numbers, exact: Numbers) -> float:
    """The largest relative distance of one tensor to its exact one, by their norms."""
    pairs = zip(ours, exact, strict=True)
    return max(float((a.float() - b).norm() / b.norm().clamp_min(1e-6)) for a, b in pairs)


def assert_as_near(ours: Numbers, plain: Numbers, exact: Numbers) -> None:
    """`ours` is at most half as far again from `exact` as `plain`, which computes in the same type: another order of
    sums, and no other numbers. Without anything that is not finite."""
    ours, plain, exact = list(ours), list(plain), [value.float() for value in exact]
    assert all(torch.isfinite(value).all() for value in ours)
    allowed = 1.5 * away(plain, exact) + 1e-5
    assert away(ours, exact) <= allowed, (away(ours, exact), allowed)
