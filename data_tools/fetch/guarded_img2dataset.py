"""img2dataset with the guard in its workers; data_tools.download starts it, in the environment of img2dataset.

Reads its settings as one line of JSON from stdin. When stdin closes, the parent process is dead, and this process ends
with all its workers. Imports nothing that the environment of img2dataset lacks.
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
import img2dataset.resizer

from data_tools.fetch.guarded_fetch import Limits, install
from data_tools.fetch.pictures import TrainingCv2
from data_tools.fetch.reasons import reason_of
from pretrain.workers import end_with_parent

WORKER_DIED = 70  # exit code
LIVE = "live"  # DIRECTORY/live/PID: a worker's counts
MAX_PIXELS = "OPENCV_IO_MAX_IMAGE_PIXELS"  # OpenCV reads the header first and rejects larger pictures
_EVERY = 0.5  # seconds


class GuardedDownloader(img2dataset.downloader.Downloader):
    """img2dataset's downloader together with its guard, so that no worker can run without it."""

    limits: Limits
    max_pixels: int

    def __call__(self, row: Any) -> Any:
        _prepare(self.limits, self.max_pixels, os.path.join(self.output_folder, LIVE))
        return super().__call__(row)


_prepared = False


def _prepare(limits: Limits, max_pixels: int, live: str) -> None:
    """Runs once in each worker process, before its first shard."""
    global _prepared
    if _prepared:
        return
    if os.environ.get(MAX_PIXELS) != str(max_pixels):
        raise RuntimeError(f"{MAX_PIXELS} must be {max_pixels} in the environment before OpenCV is imported")
    install(limits)
    img2dataset.resizer.cv2 = TrainingCv2(max_pixels)
    count = _Live(Path(live, str(os.getpid())))

    class LiveCounter(img2dataset.downloader.CappedCounter):  # img2dataset makes one per shard
        def increment(self, key: str) -> None:
            super().increment(key)
            count.add(key)

    write_stats = img2dataset.downloader.write_stats

    def write_stats_and_counts(*args: Any) -> None:
        count.write()
        write_stats(*args)

    img2dataset.downloader.CappedCounter = LiveCounter
    img2dataset.downloader.write_stats = write_stats_and_counts
    end_with_parent()
    _prepared = True


class _Live:
    """Counts this process's pictures by reason, in a file for the progress bar."""

    def __init__(self, path: Path):
        self._path, self._counts, self._last_write = path, Counter[str](), 0.0

    def add(self, message: str) -> None:
        self._counts[reason_of(message)] += 1
        if time.monotonic() - self._last_write > _EVERY:
            self.write()

    def write(self) -> None:
        self._last_write = time.monotonic()
        beside = self._path.with_suffix(".writing")
        try:
            beside.write_text(json.dumps(self._counts))
            os.replace(beside, self._path)
        except OSError:  # a full disk: the files that matter will raise
            pass


class _NoLogger:
    """Replaces img2dataset's process that prints the statistics of finished shards."""

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
    """Ends this process when a worker is killed: multiprocessing replaces the worker but not its shard, and img2dataset
    would wait for that shard forever."""
    workers: dict[int, Any] = {}
    while True:
        time.sleep(_EVERY)
        workers |= {worker.pid: worker for worker in multiprocessing.active_children() if worker.pid}
        for pid in [pid for pid, worker in workers.items() if worker.exitcode is not None]:
            if code := workers.pop(pid).exitcode:
                print(f"a worker ended with code {code}", flush=True)
                os._exit(WORKER_DIED)


def run(settings: dict[str, Any]) -> None:
    """Runs img2dataset.download with the arguments `img2dataset`, on the shards from number `first` on that are not in
    `done`, guarded by `limits` and `max_pixels`."""
    limits = Limits(**settings["limits"] | {name: tuple(settings["limits"][name]) for name in ("allow", "refuse")})
    main: Any = importlib.import_module("img2dataset.main")  # img2dataset.main is a function of that name
    main.Downloader = partial(_downloader, limits, settings["max_pixels"])
    main.Reader = partial(_reader, settings["first"], settings["done"])
    main.LoggerProcess = _NoLogger
    main.download(**settings["img2dataset"])


def main() -> None:
    line = bytearray()
    while not line.endswith(b"\n"):  # not sys.stdin, which would read ahead
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    if os.getpgrp() == os.getpid():
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    threading.Thread(target=_watch_workers, daemon=True).start()
    run(json.loads(line))
    sys.stdout.flush()
    os._exit(0)  # without waiting for remains of the pool


if __name__ == "__main__":
    main()
