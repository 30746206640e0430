"""One optimizer step, and the judgement of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.distributed import reduce_mean

log = logging.getLogger("pretrain")


def train_step(
    engine, micro_batches: list[Batch], add_targets: Callable[[Batch], Batch], *, first: bool = False
) -> dict[str, Tensor]:
    """Returns this rank's mean of what the task reported. `first`: it is the first step of a run."""
    if first:
        engine.module.before_training(micro_batches)
    total: dict[str, Tensor] = {}
    for batch in micro_batches:
        report = engine(add_targets(batch))
        engine.backward(report["loss"])
        engine.step()  # moves the weights after the last micro-step
        for name, value in report.items():
            total[name] = total.get(name, 0) + value.detach() / len(micro_batches)
    engine.module.after_step()
    return total


class Judge:
    """Ends a run that diverges: when more than `allowed` steps in a row were skipped because their gradients were not
    finite. A step is judged when the next one has been launched, so that no step waits for the device; `settle` judges
    it at once. All ranks have the same norms, and so the same judgement."""

    def __init__(self, allowed: int, way_out: str):
        self.allowed, self.way_out = allowed, way_out
        self.in_a_row = 0  # steps that were skipped, up to the one that was judged last
        self._pending: _Pending | None = None

    def note(self, step: int, norm: Tensor | float, report: dict[str, Tensor]) -> None:
        """Step `step` is launched; `norm` of its gradients and what the task reported may still lie on the device.
        Raises ValueError as `settle` does for the step before."""
        self.settle()
        read = None
        if isinstance(norm, Tensor) and norm.is_cuda:
            # A plain read would wait for all that was launched since.
            norm = torch.empty(norm.shape, pin_memory=True).copy_(norm, non_blocking=True)
            read = torch.cuda.Event()
            read.record()
        self._pending = _Pending(step, norm, read, report)

    def settle(self) -> None:
        """Judges the step that was noted last. A collective of every rank where it was skipped. Raises ValueError that
        names the step and the losses that were not finite."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.read is not None:
            pending.read.synchronize()
        norm = float(pending.norm)
        if math.isfinite(norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        losses = {name: value for name, value in pending.report.items() if name.startswith("loss")}
        wrong = [f"{name}={value}" for name, value in reduce_mean(losses).items() if not math.isfinite(value)]
        what = f"the gradient norm is {norm}" + (f" ({', '.join(wrong)})" if wrong else " while all losses are finite")
        if self.in_a_row > self.allowed:
            row = f", {self.in_a_row} steps in a row with max_skipped_steps={self.allowed}" if self.allowed else ""
            raise ValueError(f"step {pending.step}: {what}{row}; the run has diverged: {self.way_out}")
        log.warning("step %d is skipped: %s (%d of %d in a row)", pending.step, what, self.in_a_row, self.allowed)


class _Pending(NamedTuple):
    step: int
    norm: Tensor | float
    read: torch.cuda.Event | None  # when `norm` has arrived on the host
    report: dict[str, Tensor]
