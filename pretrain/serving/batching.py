"""Puts requests that wait for the model at the same time through it in one pass.

One thread owns the model. Whenever it is free, it takes the oldest job and all others of the same kind that fit. No job
waits for a timer, so a lone request is as fast as without batches, and batches grow with the load.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from pretrain.serving.limits import Deadline, Refused

Pass = Callable[[list], Sequence]  # items -> as many results, in their order


class Job(NamedTuple):
    """Items of one request that wait for a pass; `kind` is the name of the pass."""

    kind: str
    items: list
    deadline: Deadline
    future: Future


class Batcher:
    """`passes`: the functions that use the model, by name. `most`: how many items go through one together; a larger job
    goes alone. `seen(kind, number of items)` is called after each pass."""

    def __init__(self, passes: Mapping[str, Pass], most: int, seen: Callable[[str, int], None] = lambda *_: None):
        self.passes, self.most, self.seen = passes, most, seen
        self.busy_since: float | None = None  # time.monotonic(), while a pass runs
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    async def __call__(self, kind: str, items: list, deadline: Deadline) -> list[Any]:
        """The results of the items, in their order. Raises Refused where the deadline passes before their turn or the
        batcher is closed, and whatever the pass raises."""
        if not items:
            return []
        job = Job(kind, items, deadline, Future())
        with self._changed:
            if self._closed:
                raise Refused(503, "the server is shutting down; ask another")
            self._jobs.append(job)
            self._changed.notify()
        return await asyncio.wrap_future(job.future)

    def close(self) -> None:
        """Does the jobs that wait, then ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _work(self) -> None:
        while jobs := self._next():
            self.busy_since = time.monotonic()
            self._do(jobs)
            self.busy_since = None

    def _next(self) -> list[Job]:
        """The jobs of the next pass, the oldest first; [] once the batcher is closed and no job waits. Refuses those
        whose deadline has passed."""
        with self._changed:
            while True:
                together, others, count = list[Job](), deque[Job](), 0
                for job in self._jobs:
                    if job.deadline.left() <= 0:
                        _fail(job, Refused(504, "the answer was not ready in time; send less at once, or later"))
                    elif not together or (job.kind == together[0].kind and count + len(job.items) <= self.most):
                        together.append(job)
                        count += len(job.items)
                    else:
                        others.append(job)
                self._jobs = others
                if together or self._closed:
                    return together
                self._changed.wait()

    def _do(self, jobs: list[Job]) -> None:
        """One pass over the items of all jobs; if it fails, one pass for each job."""
        items = [item for job in jobs for item in job.items]
        try:
            results = list(self.passes[jobs[0].kind](items))
            if len(results) != len(items):
                raise RuntimeError(f"{jobs[0].kind}: {len(results)} results of {len(items)} items")
        except Exception as error:
            if len(jobs) == 1:
                _fail(jobs[0], error)
            else:  # one job must not spoil the others'
                for job in jobs:
                    self._do([job])
            return
        self.seen(jobs[0].kind, len(items))
        for job in jobs:
            own, results = results[: len(job.items)], results[len(job.items) :]
            if job.future.set_running_or_notify_cancel():
                job.future.set_result(own)


def _fail(job: Job, error: Exception) -> None:
    if job.future.set_running_or_notify_cancel():
        job.future.set_exception(error)
