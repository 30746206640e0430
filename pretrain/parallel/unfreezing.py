"""Parameters that are trained from a later step on, as if the optimizer met them then.

They are in the engine from the beginning, for ZeRO cannot take them in later. Until their step their gradients are
zeros, for clipping too, and their rate is zero, so that neither moments nor weight decay move them; at their step
AdamW begins to count for them. What this saves is no memory and no time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pretrain.parallel.moments import restart


class Unfreezing:
    """`first_steps`: of the parameters that wait, by name, the step in which each is trained first."""

    def __init__(self, engine: Any, first_steps: Mapping[str, int]):
        self.engine, self.first_steps = engine, first_steps
        for name, value in engine.module.named_parameters():
            if name in first_steps and value.requires_grad:
                value.register_hook(partial(self._hold, first_steps[name]))

    def _hold(self, first: int, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.engine.global_steps + 1 < first else None

    def begin_step(self) -> None:
        """Before the passes of each step."""
        step = self.engine.global_steps + 1
        if names := {name for name, first in self.first_steps.items() if first == step}:
            restart(self.engine, names)


def rates(groups: list[dict[str, Any]], factor: Callable[[int], float]) -> list[Callable[[int], float]]:
    """Each optimizer group's factor, for LambdaLR, which asks with the number of steps done."""
    return [partial(_rate, group.get("first_step", 1), factor) for group in groups]


def _rate(first: int, factor: Callable[[int], float], done: int) -> float:
    return factor(done) if done + 1 >= first else 0.0
