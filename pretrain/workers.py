"""Worker processes that end with their parent, whether it ends by an error, by Ctrl-C or by kill -9."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

GRACE_S = 0.5  # the time that workers get to remove their temporary files


@contextmanager
def worker_pool(
    workers: int,
    context: BaseContext | None = None,
    start: Callable[..., object] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[ProcessPoolExecutor]:
    """A pool of processes, each of which calls `start(*arguments)` first. An error inside the block cancels jobs that
    have not begun; Ctrl-C also ends the workers, within about GRACE_S, whatever they are doing."""
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, _start, (start, arguments)) as pool:
        try:
            yield pool
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(error, Exception):
                _end([process for process in multiprocessing.active_children() if process not in others])
            raise


def end_with_parent() -> None:
    """Ends a worker with its parent: the workers of a killed process must not hold its lock or write any more."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, daemon=True).start()


def _start(start: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to every process; the parent ends its workers
    signal.signal(signal.SIGTERM, _leave)
    end_with_parent()
    if start is not None:
        start(*arguments)


def _leave(number: int, frame: object) -> None:
    """Ends a job by an exception, so that it removes what it was writing. The pool's own code catches it and takes the
    next job, so `_end` sends the signal again until the process is gone."""
    raise SystemExit(1)


def _end(workers: list[BaseProcess]) -> None:
    end = time.monotonic() + GRACE_S
    while (alive := [worker for worker in workers if worker.is_alive()]) and time.monotonic() < end:
        for worker in alive:
            worker.terminate()
        alive[0].join(GRACE_S / 10)
    for worker in workers:
        worker.kill()
        worker.join()
