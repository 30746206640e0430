"""The checkpoints that a stage has, and why each stays."""

from __future__ import annotations

from typing import NamedTuple

from pretrain.checkpoint.directory import best_step, complete
from pretrain.report.rows import StageRun, dig, finite


class Kept(NamedTuple):
    """A complete checkpoint. `why`: "best R@1 (53.2)", "for good", or "" for one of the newest."""

    step: int
    why: str

    def __str__(self) -> str:
        return f"{self.step:,}{self.why and f' {self.why}'}"


def checkpoints(stage: StageRun) -> list[Kept]:
    """Newest first."""
    figure, every = dig(stage.recipe, "stages", stage.name, "best"), dig(stage.recipe, "keep_every")
    figure = figure if isinstance(figure, str) else ""
    history = {line["step"]: line for line in stage.during}
    best = best_step(history, figure)
    kept = []
    for _, manifest in complete(stage.directory / "checkpoints"):
        step, why = manifest["step"], []
        if step == best:
            name = figure.removeprefix("-")
            why.append(f"best {name} ({finite(history[step][name]):.4g})")
        if isinstance(every, int) and every > 0 and step % every == 0:
            why.append("for good")
        kept.append(Kept(step, ", ".join(why)))
    return kept
