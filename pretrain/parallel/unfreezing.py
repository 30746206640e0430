"""Parameters that are trained from a later step on, as if the optimizer were given them only then.

They are in the engine from the beginning, because ZeRO cannot add them later. Until their step their gradients are set
to zero, for clipping too, and their rate is zero, so that neither moments nor weight decay move them; at their step
AdamW begins to count steps for them. This saves neither memory nor time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pretrain.parallel.moments import restart


class Unfreezing:
    """`first_steps`: {parameter that waits: the first step that trains it}."""

    def __init__(self, engine: Any, first_steps: Mapping[str, int]):
        self.engine, self.first_steps = engine, first_steps
        for name, value in engine.module.named_parameters():
            if name in first_steps and value.requires_grad:
                value.register_hook(partial(self._hold, first_steps[name]))

    def _hold(self, first: int, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.engine.global_steps + 1 < first else None

    def begin_step(self) -> None:
        """Must be called before the passes of each step."""
        step = self.engine.global_steps + 1
        if names := {name for name, first in self.first_steps.items() if first == step}:
            restart(self.engine, names)


def rates(groups: list[dict[str, Any]], factor: Callable[[int], float]) -> list[Callable[[int], float]]:
    """Each optimizer group's factor, a function of the number of steps done, for LambdaLR."""
    return [partial(_rate, group.get("first_step", 1), factor) for group in groups]


def _rate(first: int, factor: Callable[[int], float], done: int) -> float:
    return factor(done) if done + 1 >= first else 0.0
