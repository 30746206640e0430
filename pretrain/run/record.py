"""What a run reports while it trains: metrics.jsonl, the display, the profile and warnings."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pretrain.distributed import fail_together
from pretrain.metrics import MetricsLog
from pretrain.run.build import Run
from pretrain.run.display import Display
from pretrain.run.profile import Profile
from pretrain.run.stragglers import meter_of
from pretrain.tasks.balance import Starvation


class Record:
    """The reports of the run in `directory`. Raises OSError on every rank if one of them cannot write."""

    def __init__(self, run: Run, directory: Path):
        self.metrics = fail_together(lambda: MetricsLog(directory, run.done, every=run.recipe.log_every))
        self.meter = meter_of(run, directory)
        self.display = Display(directory.name, run.done, run.stage.steps)
        self.profile = Profile(run.recipe.profile_steps, directory)
        self._starvation = Starvation()

    def write(self, step: int, line: dict[str, Any]) -> None:
        """Writes and shows the metrics `line` of a step, with the meter's figures for the steps since the last line. A
        collective of every rank; raises OSError on every rank if one cannot write."""
        line |= self.meter.read()
        fail_together(partial(self.metrics.write, step, line))
        self.display.show(step, line)
        self._starvation.note(step, line)

    def close(self) -> None:
        self.profile.close()
        self.display.bar.close()
        self.metrics.close()
