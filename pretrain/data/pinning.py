"""A thread copies batches into pinned memory, from where the copy to a GPU does not block."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch

from pretrain.data.micro_batches import Failure, Made
from pretrain.data.pool import Item, Pool

# Batches that wait in pinned memory, besides the one that is being copied.
_READY = 2


def pinned(
    pool: Pool, items: Iterator[Item], pin: Callable[[Made | Failure], Made | Failure] | None = None
) -> Generator[Made | Failure, None, None]:
    """The pool's results in their order, each after `pin` in a thread of its own; an error is raised in its turn."""
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(_READY)
    pin, over = pin or _pinner(), threading.Event()

    def put(value: Any, error: BaseException | None) -> None:
        while not over.is_set():
            try:
                ready.put((value, error), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for result in pool.results(items):
                put(pin(result), None)
            put(None, StopIteration())
        except BaseException as error:
            put(None, error)

    thread = threading.Thread(target=work, name="pinning", daemon=True)
    thread.start()
    try:
        while True:
            result, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            yield result
    finally:
        over.set()
        pool.stop()
        thread.join()  # before the pool ends its workers


def _pinner() -> Callable[[Made | Failure], Made | Failure]:
    device = torch.cuda.current_device()

    def pin(result: Made | Failure) -> Made | Failure:
        torch.cuda.set_device(device)  # CUDA keeps a device for each thread
        return result if isinstance(result, Failure) else result._replace(batch=result.batch.pin_memory())

    return pin
