"""Several objectives in one stage: the weights of their losses, the share of the gradient that each has, and a warning
when one of them starves."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.batch import Kinds

log = logging.getLogger("pretrain")

GRADIENT, SHARE = "gradient/", "share/"
# An objective starves if it has less than the share STARVING of the gradient in PATIENCE lines of metrics.jsonl in a
# row.
STARVING, PATIENCE = 0.02, 20


@dataclass(frozen=True)
class Ramp:
    """A weight that goes linearly from `start` to `end` over the first `steps` steps."""

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if not (0 <= self.start < math.inf and 0 < self.end < math.inf and self.steps >= 1):
            raise ValueError(f"task.weights: {self} is no ramp; use start 0 or more, end above 0 and steps 1 or more")


Weights = Mapping[str, float | Ramp]


def weight_problems(weights: Weights, names: Sequence[str]) -> list[str]:
    """What is wrong with `weights` for a stage whose objectives are called `names`; as Objective.problems."""
    problems = [
        f"task.weights.{name} is of no objective of this stage; it has {', '.join(names)}"
        for name in weights
        if name not in names
    ]
    for name, value in weights.items():
        if not isinstance(value, Ramp) and not 0 < value < math.inf:
            problems.append(f"task.weights.{name}={value} is no weight; use one above 0, or take the objective out")
    return problems


class LossWeights(nn.Module):
    """The loss of a step is the weighted sum of the objectives' losses. `learned`: each weight follows from a learned
    uncertainty (Kendall et al., arXiv 1705.07115, equation 10): exp(-s) loss + s / 2, where s is the log of its
    variance. A weight counts for both terms: for the loss alone s would outgrow it, without end where a ramp begins at
    0."""

    steps: Tensor

    def __init__(self, names: Sequence[str], weights: Weights, *, learned: bool = False):
        super().__init__()
        self.weights = {name: weights.get(name, 1.0) for name in names}
        # One element and not a scalar: ZeRO-3 partitions by rows.
        own = {name: nn.Parameter(torch.zeros(1)) for name in names} if learned else {}
        self.log_variances = nn.ParameterDict(own)
        self.ramps = any(isinstance(value, Ramp) for value in self.weights.values())
        if self.ramps:  # else checkpoints stay as they were before there were ramps
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, losses: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name -> the term that each adds to the step's loss, and `weight/NAME` of weights that change."""
        parts, report = {}, {}
        for name, loss in losses.items():
            weight: Any = self.weights[name]
            if isinstance(weight, Ramp):
                risen = (self.steps.float() / weight.steps).clamp(max=1)
                report[f"weight/{name}"] = weight = weight.start + (weight.end - weight.start) * risen
            if name in self.log_variances:
                variance = self.log_variances[name].float().squeeze()
                loss = (-variance).exp() * loss + variance / 2
                report[f"weight/{name}"] = (weight * (-variance).exp()).detach()
            parts[name] = loss if isinstance(weight, float) and weight == 1 else weight * loss
        return parts, report

    def begin(self) -> None:
        """Before the first step of a stage, which may have the weights of one before, and with them its steps."""
        if self.ramps:
            self.steps.zero_()

    def after_step(self) -> None:
        if self.ramps:
            self.steps += 1


def watched(rows: Kinds, square: Tensor) -> Kinds:
    """The same rows, for one objective alone: its backward pass adds the squared norm of its gradient at these rows to
    `square` []. Nothing is computed twice, and no step waits for the device."""
    return Kinds(*(_alias(kind, square) for kind in rows))


def _alias(rows: Tensor, square: Tensor) -> Tensor:
    if not rows.requires_grad:
        return rows
    own = rows.view_as(rows)

    def note(grad: Tensor) -> None:
        square.add_(grad.float().square().sum())

    own.register_hook(note)
    return own


def with_shares(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics with `gradient/NAME` replaced by `share/NAME`: the norm of each objective's gradient at the
    encoder's outputs, as a share of the sum of all norms."""
    norms = {key.removeprefix(GRADIENT): math.sqrt(line[key]) for key in line if key.startswith(GRADIENT)}
    whole = sum(norms.values())
    shares = {f"{SHARE}{name}": norm / whole for name, norm in norms.items() if whole > 0}
    return {key: value for key, value in line.items() if not key.startswith(GRADIENT)} | shares


class Starvation:
    """Warns of each objective that starves, once until it recovers."""

    def __init__(self) -> None:
        self.in_a_row: dict[str, int] = {}

    def note(self, step: int, line: Mapping[str, Any]) -> None:
        for name, share in ((key.removeprefix(SHARE), line[key]) for key in line if key.startswith(SHARE)):
            self.in_a_row[name] = self.in_a_row.get(name, 0) + 1 if share < STARVING else 0
            if self.in_a_row[name] == PATIENCE:
                log.warning(
                    "step %d: the objective %s starves: it had less than %.0f %% of the gradient in the last %d lines "
                    "of metrics.jsonl; raise its weight (task.weights.%s), or take it out",
                    *(step, name, 100 * STARVING, PATIENCE, name),
                )
