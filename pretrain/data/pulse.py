"""A data worker's sign of life: whatever it does, it calls `beat` at least every few seconds, unless it hangs.

The main process compares the counts (pool.py). `beat` is a module's function and not an argument, because the beats
come from deep inside a transfer as well as from the loop over samples; outside a worker it does nothing.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import MutableSequence

_counts: MutableSequence[int] | None = None  # in memory that all workers and the main process share
_number = _parent = 0


def begin(counts: MutableSequence[int], number: int) -> None:
    """Makes this process worker `number`; `counts` has a place for each worker."""
    global _counts, _number, _parent
    # The main process, or the server that forks for it and ends with it.
    _counts, _number, _parent = counts, number, os.getppid()
    main = multiprocessing.parent_process()
    if main is not None and not main.is_alive():
        os._exit(0)
    beat()


def beat() -> None:
    """Counts one sign of life of this worker; ends it if its main process is gone."""
    if _counts is None:
        return
    if os.getppid() != _parent:
        os._exit(0)
    _counts[_number] += 1
