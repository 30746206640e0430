"""One optimizer step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pretrain.batch import Batch


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
