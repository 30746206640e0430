"""Worker processes that end with their parent, whether it ends by an error, by Ctrl-C or by kill -9."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any

GRACE_S = 2.0  # the time that workers get to remove their temporary files
_leaving = False  # whether this worker was told to end


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
    with _Pool(workers, context, _start, (start, arguments)) as pool:
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
    """Ends a job by an exception, so that it removes what it was writing. Only once: a second exception would end the
    removal."""
    global _leaving
    if not _leaving:
        _leaving = True
        raise SystemExit(1)


class _Pool(ProcessPoolExecutor):
    """Its own code catches the exception of `_leave` and takes the next job; here the worker ends instead."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        return super().submit(_job, function, *arguments, **named)


def _job(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return None if _leaving else function(*arguments, **named)
    finally:
        if _leaving:
            os._exit(1)


def _end(workers: list[BaseProcess]) -> None:
    end = time.monotonic() + GRACE_S
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(max(end - time.monotonic(), 0))
        worker.kill()
        worker.join()
