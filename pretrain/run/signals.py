"""Signals by which a scheduler asks a run to save and end."""

from __future__ import annotations

import signal


class StopSignals:
    """SIGTERM (preemption) and SIGUSR1 (SLURM's --signal) ask for a stop at the next step boundary."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
