"""Evaluations of a stage while it trains: their figures, which step is the best so far, and whether the stage ends
early.

Rank 0 builds the whole model once more from the weights after the step and evaluates it, so that the figures are those
of `pretrain.evaluate` on a checkpoint of that step; the other ranks wait for it. It touches nothing of the training and
restores the random generators: a run has the same numbers with evaluations and without.

The figures are lines of evals.jsonl. Which step is best and whether the stage ends early follow from these lines alone.
A run that goes on from a checkpoint has the lines up to it, so that it decides as it would have without the stop.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from pretrain.checkpoint.directory import best_step, place_of
from pretrain.checkpoint.snapshot import random_state, set_random_state
from pretrain.distributed import device, fail_together, gather_objects, rank, refuse_together
from pretrain.files import Lines, write_file
from pretrain.json_files import parse_json
from pretrain.metrics import EVALS, MetricsLog
from pretrain.parallel.state import fill, named_state
from pretrain.run.build import Run, build_task
from pretrain.run.continuation import CHECKPOINTS, parents
from pretrain.run.trained import evaluate, said, trained_stage
from pretrain.settings import nearest

log = logging.getLogger("pretrain")

Figures = dict[str, float]


class Progress:
    """The evaluations of the run in `directory`, which goes on from step run.done. `inputs`: the run directory with the
    stages that its settings name. Every rank must construct it, and call `evaluate`, together."""

    def __init__(self, run: Run, inputs: Path, directory: Path):
        self.run, self.stage, self.inputs, self.directory = run, run.stage, inputs, directory
        self._path = directory / EVALS
        lines = fail_together(lambda: _cut(self._path, run.done) if rank() == 0 else {})
        self.history: dict[int, Figures] = gather_objects(lines)[0]
        self._problem = ""

    def due(self, step: int) -> bool:
        """Whether the stage is to be evaluated after `step` and has not been."""
        every = self.stage.evals_every
        return bool(every and step and step % every == 0 and step not in self.history)

    @property
    def best(self) -> int | None:
        """The first step with the best value of the figure `stage.best`; None if no figure is named or none is
        finite."""
        return best_step(self.history, self.stage.best)

    @property
    def ended(self) -> bool:
        """Whether the last `patience` evaluations or more brought no better figure."""
        after = [step for step in self.history if self.best is not None and step > self.best]
        return bool(self.stage.patience) and len(after) >= self.stage.patience

    @property
    def why(self) -> str:
        """Why the stage ended early, for the log."""
        return f"as no later evaluation than that after step {self.best} gave a better {self.stage.best}"

    def catch_up(self, metrics: MetricsLog) -> None:
        """Evaluates the step from which the run goes on, if a signal stopped it between saving and evaluating."""
        own = place_of(self.directory / "checkpoints", self.run.done)
        if gather_objects(self.due(self.run.done) and own.is_dir())[0]:
            self.evaluate(self.run.done, metrics)

    def evaluate(self, step: int, metrics: MetricsLog) -> bool:
        """Evaluates the model after `step` -> whether a checkpoint of it is to be saved. Raises ValueError on every
        rank if an evaluation refuses its data or settings, OSError if the figures cannot be written."""
        start = time.monotonic()
        state, figures, problem = self.run.whole_state(), Figures(), None
        try:
            if rank() == 0:
                with _same_generators():
                    figures = self._figures(state)
        except (ValueError, OSError) as error:
            problem = f"the evaluation after step {step}: {error}"
        except torch.OutOfMemoryError:
            problem = (
                f"the evaluation after step {step} needs a second copy of the model, and the GPU's memory is full; "
                "use a smaller batch of the evals, or evals_every=0 and pretrain.evaluate"
            )
        refuse_together(problem)
        self.history[step] = figures = gather_objects(figures)[0]
        seconds = time.monotonic() - start
        fail_together(lambda: self._write(step, figures, seconds) if rank() == 0 else None)
        metrics.show(step, {f"evals/{name}": value for name, value in figures.items()})
        if (best := self.stage.best.removeprefix("-")) and best not in figures:
            self._problem = f"best={self.stage.best}: the evals give no such figure{nearest(best, list(figures))}"
        so_far = f", {best} {figures[best]:.4g}, best so far at step {self.best}" if best in figures else ""
        log.info("step %d: evaluated in %.1f s%s", step, seconds, so_far)
        return step == self.best or bool(self._problem)

    def check(self) -> None:
        """ValueError on every rank if `best` names no figure of the evaluations. Called after the first evaluation,
        whose checkpoint is saved by then."""
        if self._problem:
            raise ValueError(f"{self._problem}; the run is saved, start it with another one")

    def best_checkpoint(self) -> Path | None:
        """The best checkpoint of a stage that ended early, in its own directory or in that of a run that it continues;
        None on every rank, with a warning, if it is gone."""
        assert self.best is not None
        step = self.best
        places = [place_of(run / CHECKPOINTS, step) for run in (self.directory, *parents(self.directory))]
        here = gather_objects(next((str(path) for path in places if path.is_dir()), ""))[0]
        if here:
            return Path(here)
        log.warning("%s, the best checkpoint, is gone; the last step's weights are handed over", places[0])
        return None

    def _figures(self, state: dict[str, Tensor]) -> Figures:
        recipe, stage = self.run.recipe, self.stage
        task = build_task(recipe, stage, self.inputs, trains=False)
        for name, value in named_state(task).items():
            fill(value, state[name])
        task.to(device()).eval()
        with TemporaryDirectory() as pictures:  # only pretrain.evaluate keeps pictures
            trained = trained_stage(recipe, stage, self.inputs, Path(pictures), task, self.run.add_targets)
            return said("evals", evaluate(stage, trained)[0])

    def _write(self, step: int, figures: Figures, seconds: float) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        file = Lines(self._path)
        try:
            file.write(json.dumps({"step": step, "seconds": seconds, **finite}).encode() + b"\n")
            file.sync()
        finally:
            file.close()


def _cut(path: Path, done: int) -> dict[int, Figures]:
    """{step: its figures} up to step `done`; later and damaged lines are removed from the file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    lines: dict[int, dict[str, Any]] = {}
    for text in raw.splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(step := line.get("step"), int) and step <= done:
            lines[step] = line
    write_file(path, b"".join(json.dumps(line).encode() + b"\n" for line in lines.values()))
    return {step: {k: v for k, v in line.items() if k not in ("step", "seconds")} for step, line in lines.items()}


@contextmanager
def _same_generators() -> Iterator[None]:
    """Restores the random generators at the end."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
