"""Where the time of some steps goes: a trace for a browser, a snapshot of a GPU's memory, the costliest operators."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pretrain.config import profiled_steps
from pretrain.distributed import rank
from pretrain.files import written_in_one_step

log = logging.getLogger("pretrain")

LINES = 5
ALLOCATIONS = 100_000  # the last ones, whose stack traces the snapshot holds


class Profile:
    """Profiles the steps FIRST:LAST that `asked` names (Recipe.profile_steps) on rank 0, into one trace,
    `directory`/profile/trace_FIRST_LAST.json.gz (for chrome://tracing or ui.perfetto.dev), and on a GPU
    memory_FIRST_LAST.pickle (for pytorch.org/memory_viz; nothing here reads it). On other ranks, and with an empty
    `asked`, it does nothing. The profiler slows down the steps that it sees and changes none of their numbers."""

    def __init__(self, asked: str, directory: Path):
        self.steps = profiled_steps(asked) if rank() == 0 else None
        self.directory = directory / "profile"
        self._running: Any = None
        self._first = self._last = 0

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """A context around step `number`."""
        if self.steps is not None and self._running is None and self.steps[0] <= number <= self.steps[1]:
            self._begin(number)
        yield
        if self._running is not None:
            self._last = number
            if self.steps is not None and number >= self.steps[1]:
                self.close()

    def close(self) -> None:
        """Writes what was profiled so far, if anything was. An OSError is only a warning: a profile is worth less than
        the run."""
        running, self._running = self._running, None
        if running is None:
            return
        running.stop()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._write(running)
        except OSError as error:
            log.warning("the profile of steps %d to %d could not be written: %s", self._first, self._last, error)
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(enabled=None)
        for line in dearest(running.key_averages(), self._last - self._first + 1):
            log.info(line)

    def _begin(self, number: int) -> None:
        activities, self._first = [ProfilerActivity.CPU], number
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=ALLOCATIONS)
        self._running = profile(activities=activities)
        self._running.start()

    def _write(self, running: Any) -> None:
        which = f"{self._first}_{self._last}"
        with written_in_one_step(self.directory / f"trace_{which}.json.gz") as growing:
            running.export_chrome_trace(str(growing))
        if torch.cuda.is_available():
            with written_in_one_step(self.directory / f"memory_{which}.pickle") as growing:
                torch.cuda.memory._dump_snapshot(str(growing))
        log.info("wrote the profile of steps %d to %d to %s", self._first, self._last, self.directory)


def dearest(averages: Any, steps: int) -> list[str]:
    """The LINES operators with the most self time on the GPU (without a GPU: on the CPU), a line of text each."""

    def own(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    on_gpu = any(event.self_device_time_total for event in averages)
    total = sum(own(event) for event in averages) or 1
    lines = []
    for event in sorted(averages, key=own, reverse=True)[:LINES]:
        share, ms, calls = 100 * own(event) / total, own(event) / 1e3 / steps, event.count / steps
        lines.append(f"{share:5.1f} %  {ms:9.2f} ms a step  {calls:6.0f} calls  {event.key}")
    return lines
