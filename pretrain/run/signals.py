"""Signals by which a scheduler asks a run to save and end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopped(BaseException):
    """A signal came while there was nothing to finish."""


class StopSignals:
    """SIGTERM (preemption) and SIGUSR1 (SLURM's --signal) ask for a stop at the next step boundary, or at once: before
    the first step, and where `at_once` says so."""

    def __init__(self) -> None:
        self.asked, self._at_once = False, True
        self._since: float | None = None
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGUSR1)}
        # Python runs a handler when the main thread comes back from C++, which may wait for other ranks: the byte that
        # is written at once tells `seconds`.
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def seconds(self) -> float:
        """Since a signal asked for the end; 0 before."""
        return 0.0 if self._since is None else time.monotonic() - self._since

    def restore(self) -> None:
        """Signals are again what they were before."""
        signal.set_wakeup_fd(-1)
        os.close(self._writing)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self) -> None:
        """Steps begin, and a signal waits for their ends."""
        self._at_once = False

    @contextmanager
    def at_once(self, allowed: bool) -> Iterator[None]:
        """Inside, a signal raises Stopped where that is `allowed`."""
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
