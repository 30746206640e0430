"""A process beside the workers reads the order ahead and fetches remote shards into the cache before a worker needs
them.

If it fails, that costs only time: a worker that misses a shard fetches it itself. By the cache's locks a shard is
fetched once, whoever comes first.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from pretrain.data import pulse
from pretrain.data.micro_batches import Feed, Share
from pretrain.data.pool import ignore_signals
from pretrain.data.shards.reader import ShardReader

# How many steps ahead, as long as the shards of these steps fit into half of this rank's part of the cache.
STEPS = 256
FETCHES = 4  # downloads at a time
_TICK_S = 0.25
Place = tuple[int, int]  # (a feed's number, a shard's number)


class LookAhead:
    """Fetches the shards of the steps up to `stop`, ahead of the last step that was `reached`. Use it as a context; it
    does nothing if no shard is remote."""

    def __init__(self, feeds: Sequence[Feed], share: Share, start: int, stop: int):
        remote = [feed for feed in feeds if feed.reader.cache is not None]
        context = multiprocessing.get_context()
        self._step = context.RawValue(ctypes.c_int64, start)
        arguments = (remote, share, self._step, stop, os.getpid())
        self._process = context.Process(target=_run, args=arguments, daemon=True) if remote else None

    def __enter__(self) -> LookAhead:
        if self._process is not None:
            self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()  # the cache's next user takes over its unfinished downloads
            self._process.join(1)

    def reached(self, step: int) -> None:
        """Must be called when the workers begin with `step`."""
        self._step.value = step


def _run(feeds: list[Feed], share: Share, step: Any, stop: int, parent: int) -> None:
    """The body of the process."""
    ignore_signals(parent)
    pulse.begin([0], 0)
    here = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)  # ranks that share the cache
    room = min(feed.reader.cache.limit for feed in feeds if feed.reader.cache) // 2 // here
    # A reader serves one thread.
    readers: SimpleQueue[list[ShardReader]] = SimpleQueue()
    for _ in range(FETCHES):
        readers.put([feed.reader.again() for feed in feeds])

    def fetch(place: Place) -> None:
        own = readers.get()
        try:
            with suppress(
                ValueError, OSError
            ):  # the worker that needs the shard will meet the same error and report it
                own[place[0]].fetch(place[1])
        finally:
            readers.put(own)

    with ThreadPoolExecutor(FETCHES) as pool:
        for place in places_ahead(feeds, share, step, stop, room):
            if place is None:
                pulse.beat()
                time.sleep(_TICK_S)
            else:
                pool.submit(fetch, place)


def places_ahead(feeds: list[Feed], share: Share, step: Any, stop: int, room: int) -> Iterator[Place | None]:
    """The shards to fetch, in the order in which they are needed, each once while it is needed; None: nothing to do
    now. `step.value`: the step that the workers have reached; `room`: bytes that the shards ahead may take together."""
    ahead: deque[tuple[int, list[Place]]] = deque()
    needed: Counter[Place] = Counter()  # how many of the steps ahead need each shard
    used, coming = 0, step.value + 1
    while coming <= stop:
        while ahead and ahead[0][0] <= step.value:
            for place in ahead.popleft()[1]:
                needed[place] -= 1
                used -= 0 if needed[place] else _size(feeds, place)
        coming = max(coming, step.value + 1)
        if coming > step.value + STEPS or (ahead and used > room):
            yield None
            continue
        places = [(number, shard) for number, feed in enumerate(feeds) for shard in _shards(feed, share, coming)]
        ahead.append((coming, places))
        coming += 1
        for place in places:
            needed[place] += 1
            if needed[place] == 1:
                used += _size(feeds, place)
                yield place


def _size(feeds: list[Feed], place: Place) -> int:
    return feeds[place[0]].reader.manifest.shards[place[1]].bytes


def _shards(feed: Feed, share: Share, step: int) -> list[int]:
    """The shards that this rank reads in a step, in the order of its micro-steps."""
    size = feed.total // share.ranks
    rows = feed.order.rows(step, feed.total)[share.rank * size : (share.rank + 1) * size]
    return list(dict.fromkeys(rows[:, 1].tolist()))
