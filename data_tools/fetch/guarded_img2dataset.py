"""img2dataset with the guard inside its workers: what data_tools.download starts, in the environment of img2dataset.

Reads its settings as one line of JSON from stdin. The line stays open: when it closes, whoever started this is gone,
and this process ends with all its workers. Imports nothing that the environment of img2dataset lacks.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import img2dataset.downloader
import img2dataset.reader

from data_tools.fetch.guarded_fetch import Limits, install
from data_tools.fetch.reasons import reason_of
from data_tools.ownership import end_with_parent

WORKER_DIED = 70  # exit code
LIVE = "live"  # DIRECTORY/live/PID: what a worker has counted
MAX_PIXELS = "OPENCV_IO_MAX_IMAGE_PIXELS"  # OpenCV looks at the header first and refuses what is larger
_EVERY = 0.5  # seconds


class GuardedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's own, carrying its guard with it: no worker can run it without."""

    limits: Limits
    max_pixels: int

    def __call__(self, row: Any) -> Any:
        _prepare(self.limits, self.max_pixels, os.path.join(self.output_folder, LIVE))
        return super().__call__(row)


_prepared = False


def _prepare(limits: Limits, max_pixels: int, live: str) -> None:
    """Once in each worker process, before its first shard."""
    global _prepared
    if _prepared:
        return
    if os.environ.get(MAX_PIXELS) != str(max_pixels):
        raise RuntimeError(f"{MAX_PIXELS} has to be {max_pixels} in the environment before OpenCV is loaded")
    install(limits)
    count = _Live(Path(live, str(os.getpid())))

    class Counted(img2dataset.downloader.CappedCounter):  # img2dataset makes one per shard
        def increment(self, key: str) -> None:
            super().increment(key)
            count.add(key)

    write_stats = img2dataset.downloader.write_stats

    def counted_stats(*args: Any) -> None:
        count.write()
        write_stats(*args)

    img2dataset.downloader.CappedCounter = Counted
    img2dataset.downloader.write_stats = counted_stats
    end_with_parent()
    _prepared = True


class _Live:
    """Counts of this process's pictures by reason, in a file for the progress bar."""

    def __init__(self, path: Path):
        self._path, self._counts, self._written = path, Counter[str](), 0.0

    def add(self, message: str) -> None:
        self._counts[reason_of(message)] += 1
        if time.monotonic() - self._written > _EVERY:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        beside = self._path.with_suffix(".writing")
        try:
            beside.write_text(json.dumps(self._counts))
            os.replace(beside, self._path)
        except OSError:  # a full disk is told by what cannot do without
            pass


class _NoLogger:
    """In place of img2dataset's process that prints the statistics of finished shards."""

    def __init__(self, *args: Any):
        self.done_shards: set[int] = set()

    def start(self) -> None: ...

    def terminate(self) -> None: ...

    def join(self) -> None: ...


def _reader(first: int, done: list[int], *args: Any) -> Any:
    reader = img2dataset.reader.Reader(*args)
    reader.start_shard_id = first
    reader.done_shards = set(done)
    return reader


def _downloader(limits: Limits, max_pixels: int, **settings: Any) -> GuardedDownloader:
    downloader = GuardedDownloader(**settings)
    downloader.limits, downloader.max_pixels = limits, max_pixels
    return downloader


def _end_with_stdin() -> None:
    while os.read(0, 4096):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _watch_workers() -> None:
    """multiprocessing replaces a worker that was killed, but not its shard: img2dataset would wait for it for ever."""
    workers: dict[int, Any] = {}
    while True:
        time.sleep(_EVERY)
        workers |= {worker.pid: worker for worker in multiprocessing.active_children() if worker.pid}
        for pid in [pid for pid, worker in workers.items() if worker.exitcode is not None]:
            if code := workers.pop(pid).exitcode:
                print(f"a worker ended with code {code}", flush=True)
                os._exit(WORKER_DIED)


def run(settings: dict[str, Any]) -> None:
    """img2dataset.download with the keys `img2dataset`, its shards numbered from `first` without those that are `done`,
    guarded by `limits` and `max_pixels`."""
    limits = Limits(**settings["limits"] | {"allow": tuple(settings["limits"]["allow"])})
    main: Any = importlib.import_module("img2dataset.main")  # img2dataset.main is a function of that name
    main.Downloader = partial(_downloader, limits, settings["max_pixels"])
    main.Reader = partial(_reader, settings["first"], settings["done"])
    main.LoggerProcess = _NoLogger
    main.download(**settings["img2dataset"])


def main() -> None:
    line = bytearray()
    while not line.endswith(b"\n"):  # not through sys.stdin, which would read ahead
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    if os.getpgrp() == os.getpid():
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    threading.Thread(target=_watch_workers, daemon=True).start()
    run(json.loads(line))
    sys.stdout.flush()
    os._exit(0)  # without waiting for what the pool left behind


if __name__ == "__main__":
    main()
