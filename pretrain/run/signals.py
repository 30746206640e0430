"""The signals by which a scheduler asks a run to save and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """A signal asked for a stop while there was no step to finish."""


class StopSignals:
    """SIGTERM (preemption) and SIGUSR1 (SLURM's --signal) ask for a stop at the next step boundary, or at once: before
    the first step, and where `at_once` says so."""

    def __init__(self) -> None:
        self.asked, self._at_once = False, True
        self._since: float | None = None
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
        # Python runs a handler only when the main thread comes back from C++, where it may wait for other ranks. The
        # byte that is written to this pipe at once tells `seconds` the true time of the signal.
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def seconds(self) -> float:
        """How long ago a signal asked for the end; 0 if none did."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def restore(self) -> None:
        """Puts back the handlers from before."""
        signal.set_wakeup_fd(-1)
        os.close(self._writing)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """From now on a signal waits for the end of the step."""
        self._at_once = False

    @contextmanager
    def at_once(self, allowed: bool) -> Iterator[None]:
        """If `allowed`, a signal raises Stopped inside, also one that came before."""
        self._at_once = allowed
        try:
            if allowed and self.asked:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
        if self._at_once:
            self._at_once = False
            raise Stopped

    def _listen(self) -> None:
        while number := os.read(self._reading, 1):
            if number[0] in self._before and self._since is None:
                self._since = time.monotonic()
        os.close(self._reading)
