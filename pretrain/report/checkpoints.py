"""The checkpoints that a stage has, and why each of them is kept."""

from __future__ import annotations

from typing import NamedTuple

from pretrain.checkpoint.directory import best_step, complete
from pretrain.report.rows import StageRun, dig, finite


class Entry(NamedTuple):
    """A complete checkpoint. `reason` says why it is kept: "best R@1 (53.2)", "for good", or "" for one of the
    newest."""

    step: int
    reason: str

    def __str__(self) -> str:
        return f"{self.step:,}{self.reason and f' {self.reason}'}"


def checkpoints(stage: StageRun) -> list[Entry]:
    """The stage's complete checkpoints, newest first."""
    figure, every = dig(stage.recipe, "stages", stage.name, "best"), dig(stage.recipe, "keep_every")
    figure = figure if isinstance(figure, str) else ""
    history = {line["step"]: line for line in stage.during}
    best = best_step(history, figure)
    entries = []
    for _, manifest in complete(stage.directory / "checkpoints"):
        step, reasons = manifest["step"], []
        if step == best:
            name = figure.removeprefix("-")
            reasons.append(f"best {name} ({finite(history[step][name]):.4g})")
        if isinstance(every, int) and every > 0 and step % every == 0:
            reasons.append("for good")
        entries.append(Entry(step, ", ".join(reasons)))
    return entries
