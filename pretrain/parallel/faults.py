"""A rank that dies or hangs: every other one ends within the configured time, with one sentence and a code of its own.

The connections of a dead rank close, and the next call of its peers fails: gloo raises at once; under NCCL torch's own
watchdog ends the process, with lines of its own. A rank that hangs closes nothing, and for it there is `Watch`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from typing import NoReturn

import torch.distributed as dist

from pretrain.distributed import rank, world_size

log = logging.getLogger("pretrain")

# EX_UNAVAILABLE of sysexits.h: another rank, or the data, did not answer. A failure for every launcher.
LOST = 69
# Starting and saving take longer than a step, by other amounts on each rank: they get at least so long.
PATIENCE_S = 600.0
TICK_S = 0.25
# EX_TEMPFAIL of sysexits.h: stopped by a signal; a launcher may start the same line again.
STOPPED = 75
# So long a run that was asked to end may wait for its data or, at its start, for other ranks.
GRACE_S = 20.0
WAY_OUT = "checkpoints are intact, start the same line again"


class Watch:
    """Ends this process with LOST when it stays longer than `timeout_s` in one part of the run. It is a thread of its
    own, as the main one may wait for the others in gloo, NCCL or CUDA; and it counts time by its own ticks, so that a
    job that is suspended as a whole and goes on later is not ended for it. `asked_s`: seconds since a signal asked for
    the end; what waits is then ended with STOPPED."""

    def __init__(self, asked_s: Callable[[], float] = lambda: 0.0) -> None:
        self.timeout_s = self._limit = self._waited = 0.0
        self.asked_s, self._starting = asked_s, True
        self._doing, self.waits_for_data = "the start", False  # or for another rank
        self._over = threading.Event()

    def start(self, timeout_s: float) -> None:
        """Count from now on. A process alone waits for nothing but its data."""
        self.timeout_s = timeout_s
        self.enter("the start", patient=True)
        self._starting = True
        threading.Thread(target=self._count, name="watch", daemon=True).start()

    def enter(self, doing: str, *, patient: bool = False) -> None:
        """The next part of the run. `patient`: one that may take PATIENCE_S."""
        self._limit = max(self.timeout_s, PATIENCE_S) if patient else self.timeout_s
        self._doing, self.waits_for_data, self._waited, self._starting = doing, False, 0.0, False

    def extend(self) -> None:
        """The part that the run is in takes longer, as a patient one."""
        self.enter(self._doing, patient=True)

    def stop(self) -> None:
        self._over.set()

    @property
    def outlast_s(self) -> float:
        """For the collectives' own timeouts, which speak less clearly: longer than this watch ever waits."""
        return 1.5 * max(self.timeout_s, PATIENCE_S)

    def outlast_all(self) -> None:
        """Gives every process group that time: DeepSpeed makes its groups with torch's default (NCCL: 10 minutes)."""
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=self.outlast_s), group)

    def explain(self, error: Exception) -> str | None:
        """The sentence for an error that means that another process is gone; None for any other error."""
        text = str(error)
        if worker_died(error):
            return (
                f"{place()}: a data worker died (in {self._doing}: {text.splitlines()[0].rstrip('. ')}), most likely "
                f"killed because the memory was full; use less loading.workers or loading.prefetch; {WAY_OUT}"
            )
        if not (isinstance(error, dist.DistError) or "gloo/transport" in text or "NCCL error" in text):
            return None
        sentence = (
            f"{place()}: another rank died or hung up (in {self._doing}; see what it wrote, if it could); {WAY_OUT}"
        )
        # This rank's own error, if it met the lost rank while it handled that.
        cause = error.__context__
        return sentence if cause is None else f"{sentence} (after {type(cause).__name__}: {cause})"

    def _count(self) -> None:
        while not self._over.wait(TICK_S):
            self._waited += TICK_S
            if self.asked_s() > GRACE_S and (self.waits_for_data or self._starting):
                log.error("%s: stopped by a signal (in %s); %s", place(), self._doing, WAY_OUT)
                _end_now(STOPPED)
            if self._waited > self._limit and (self.waits_for_data or world_size() > 1):
                what = "its own data did not come" if self.waits_for_data else "another rank did not answer"
                log.error("%s: %s within %.0f s (in %s); %s", place(), what, self._limit, self._doing, WAY_OUT)
                _end_now(LOST)


def worker_died(error: Exception) -> bool:
    """Whether torch says that a data worker was killed or has ended, for which it has no exception class. What is
    raised in a worker ("Caught KeyError in DataLoader worker ...") is another matter."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid")


def place() -> str:
    return f"rank {rank()} of {world_size()}"


def leave(code: int) -> int:
    """`code`, for a process alone. One of several ends here: what Python and torch take down at their end may wait for
    ranks that are no more, and has aborted pipeline runs that were done (some 2 of 50 on gloo; why is not known). The
    others wait for this one until its connections close."""
    if world_size() == 1:
        # torch's handler would raise "DataLoader worker is killed" for these too, wherever this thread is by then.
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in _kill_workers():  # Python would wait for one that hangs
            worker.join()
        signal.signal(signal.SIGCHLD, handler or signal.SIG_DFL)
        return code
    _end_now(code)


def _kill_workers() -> list[BaseProcess]:
    # Those of the data loader; they are deaf to gentler signals.
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    for worker in workers:
        worker.kill()
    return workers


def _end_now(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    _kill_workers()
    os._exit(code)
