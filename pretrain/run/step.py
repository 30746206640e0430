"""One optimizer step, and the judgement whether the run has diverged."""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.distributed import reduce_mean
from pretrain.rollbacks import RollbackRule

log = logging.getLogger("pretrain")


def train_step(
    engine, micro_batches: list[Batch], add_targets: Callable[[Batch], Batch], *, first: bool = False
) -> dict[str, Tensor]:
    """One optimizer step -> this rank's means over its micro-batches of the scalars that the task reports. `first`: it
    is a run's first step."""
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


class Diverged(ValueError):
    """The run has diverged in the steps `first` to `step`; `what` describes how."""

    def __init__(self, first: int, step: int, what: str, way_out: str):
        super().__init__(f"step {step}: {what}; the run has diverged: {way_out}")
        self.first, self.step, self.what, self.way_out = first, step, what, way_out


def way_out(rule: RollbackRule, directory: Path) -> str:
    """What a user can do after the run in `directory` has diverged; the end of Diverged's message."""
    back = "" if rule.most else ", or let it go back and pass over those batches by rollback.most=3"
    return (
        f"its checkpoints in {directory / 'checkpoints'} are from before; use a lower optim.lr or a longer "
        f"optim.warmup_steps{back}"
    )


class Judge:
    """Decides whether a run has diverged: if more than `allowed` steps in a row were skipped because their gradients
    were not finite, or if rule.spikes steps in a row were spikes. A spike is a gradient norm above rule.spike times the
    median of `norms`, the last rule.window norms that were no spikes; until there are as many, no norm is one. The
    judge adds to `norms`.

    A step is judged when the next one has been launched, so that no step waits for the device; `settle` judges it at
    once. All ranks have the same norms and come to the same judgement."""

    def __init__(self, allowed: int, rule: RollbackRule, way_out: str, norms: deque[float] | None = None):
        self.allowed, self.rule, self.way_out = allowed, rule, way_out
        self.norms: deque[float] = deque(maxlen=rule.window) if norms is None else norms
        self.in_a_row = 0  # how many steps in a row were skipped, up to the one that was judged last
        self.spikes = 0  # how many were spikes, likewise
        self._pending: _Pending | None = None

    @property
    def calm(self) -> bool:
        """Whether the step that was judged last was neither skipped nor a spike, so that its weights are worth
        saving."""
        return not self.in_a_row and not self.spikes

    def note(self, step: int, norm: Tensor | float, report: dict[str, Tensor]) -> None:
        """Notes that `step` has been launched; the `norm` of its gradients and the task's report may still lie on the
        device. First judges the step before, and raises Diverged as `settle` does."""
        self.settle()
        read = None
        if isinstance(norm, Tensor) and norm.is_cuda:
            # A plain read would also wait for everything that is launched until then.
            norm = torch.empty(norm.shape, pin_memory=True).copy_(norm, non_blocking=True)
            read = torch.cuda.Event()
            read.record()
        self._pending = _Pending(step, norm, read, report)

    def settle(self) -> None:
        """Judges the step that was noted last; a collective of every rank if it was skipped. Raises Diverged, which
        names the step and the losses that were not finite."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        if pending.read is not None:
            pending.read.synchronize()
        norm = float(pending.norm)
        if math.isfinite(norm):
            self.in_a_row = 0
            self._look_for_spike(pending.step, norm)
        else:
            self._skipped(pending, norm)

    def _skipped(self, pending: _Pending, norm: float) -> None:
        self.in_a_row += 1
        losses = {name: value for name, value in pending.report.items() if name.startswith("loss")}
        wrong = [f"{name}={value}" for name, value in reduce_mean(losses).items() if not math.isfinite(value)]
        what = f"the gradient norm is {norm}" + (f" ({', '.join(wrong)})" if wrong else " while all losses are finite")
        if self.in_a_row > self.allowed:
            row = f", {self.in_a_row} steps in a row with max_skipped_steps={self.allowed}" if self.allowed else ""
            raise Diverged(pending.step - self.in_a_row + 1, pending.step, what + row, self.way_out)
        log.warning("step %d is skipped: %s (%d of %d in a row)", pending.step, what, self.in_a_row, self.allowed)

    def _look_for_spike(self, step: int, norm: float) -> None:
        if not self.rule.spike:
            return
        full = len(self.norms) == self.rule.window
        usual = (statistics.median(self.norms) if full else 0) or math.inf
        if norm <= self.rule.spike * usual:
            self.spikes = 0
            self.norms.append(norm)
            return
        self.spikes += 1
        what = f"the gradient norm is {norm:.4g}, {norm / usual:.1f} times the median of {self.rule.window} steps"
        if self.spikes >= self.rule.spikes:
            row = f", {self.spikes} steps in a row above rollback.spike={self.rule.spike:g}"
            raise Diverged(step - self.spikes + 1, step, what + row, self.way_out)
        log.warning("step %d: %s (spike %d of %d in a row)", step, what, self.spikes, self.rule.spikes)


class _Pending(NamedTuple):
    """A step that has been launched but not judged."""

    step: int
    norm: Tensor | float
    read: torch.cuda.Event | None  # when `norm` has arrived on the host
    report: dict[str, Tensor]
