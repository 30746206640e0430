"""A run's measurements (samples/s, MFU, data wait, memory), and where they go: metrics.jsonl, TensorBoard, W&B."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import os
import resource
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from pretrain.distributed import rank
from pretrain.files import Lines, sync, write_file
from pretrain.flops import StepFlops, peak_flops
from pretrain.json_files import parse_json, read_bytes
from pretrain.weights_and_biases import WandbRun, chosen_mode

log = logging.getLogger(__name__)

FILE, EVALS = "metrics.jsonl", "evals.jsonl"
_MAX_BYTES = 2**30  # of a metrics.jsonl that is read
# Measured by the clock or the allocator: even two runs that are equal bit for bit differ in these.
MEASURED = (
    *("samples_per_s", "tokens_per_s", "real_tokens_per_s"),
    *("mfu", "mfu_real", "mfu_executed", "data_wait", "memory_gib"),
    *("data_wait/read", "data_wait/decode", "data_wait/transfer"),
    *("pass_spread", "wait_spread", "slow_rank"),  # see run/stragglers.py
)


class Throughput:
    """A meter of the steps since it was last read. `data_ranks`: ranks that work on different data."""

    def __init__(self, device: torch.device | str, data_ranks: int = 1):
        self.device, self.data_ranks = torch.device(device), data_ranks
        self.peak = peak_flops(self.device)
        self._mark = time.perf_counter()
        self._seconds = self._waited = self._read = self._decode = 0.0
        self._samples = self._tokens = self._real = 0
        self._flops = StepFlops()

    def wait(self, seconds: float, read: float = 0.0, decode: float = 0.0) -> None:
        """Adds the seconds that the step waited for its data, and how many of them for reading and for decoding. The
        rest is the transfer to the device, and to other ranks that share the micro-batch."""
        self._waited, self._read, self._decode = self._waited + seconds, self._read + read, self._decode + decode

    def tick(self, *, samples: int, tokens: int, real: int, flops: StepFlops) -> None:
        """Counts a step. `samples`: in the global batch; `tokens`: rows of this rank, padding included; `real`: those
        that are not padding; `flops`: this rank's."""
        self._add_time()
        self._samples, self._tokens, self._real = self._samples + samples, self._tokens + tokens, self._real + real
        self._flops = StepFlops(*map(sum, zip(self._flops, flops, strict=True)))

    def skip(self) -> None:
        """Forgets the time since the last call, which went into something else, such as saving."""
        self._mark = time.perf_counter()

    def read(self) -> dict[str, float | None]:
        """Means since the last reading: for the whole run samples_per_s, tokens_per_s (rows, with padding) and
        real_tokens_per_s (without padding); the three of `mfu`; data_wait (fraction of the time) with its causes read,
        decode and transfer; memory_gib (peak: allocated on the GPU, else of the process)."""
        self._add_time()
        seconds = max(self._seconds, 1e-9)
        values = {
            "samples_per_s": self._samples / seconds,
            "tokens_per_s": self._tokens * self.data_ranks / seconds,
            "real_tokens_per_s": self._real * self.data_ranks / seconds,
            **self.mfu(self._flops, seconds),
            "data_wait": min(self._waited / seconds, 1.0),
            "data_wait/read": min(self._read / seconds, 1.0),
            "data_wait/decode": min(self._decode / seconds, 1.0),
            "data_wait/transfer": min(max(self._waited - self._read - self._decode, 0.0) / seconds, 1.0),
            "memory_gib": _memory_gib(self.device),
        }
        self._clear()
        return values

    def mfu(self, flops: StepFlops, seconds: float) -> dict[str, float | None]:
        """Shares of the device's peak, None if that is unknown: mfu by the model FLOPs of all rows, padding included as
        is usual; mfu_real by those of real rows; mfu_executed by the part of these that was computed."""
        rates = [each / seconds / self.peak if self.peak else None for each in flops]
        return dict(zip(("mfu", "mfu_real", "mfu_executed"), rates, strict=True))

    def _add_time(self) -> None:
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now

    def _clear(self) -> None:
        self._seconds = self._waited = self._read = self._decode = 0.0
        self._samples = self._tokens = self._real = 0
        self._flops = StepFlops()


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class MetricsLog:
    """Writes `run_dir`/metrics.jsonl, and the same figures for TensorBoard and W&B, on rank 0 only. Lines beyond
    `resume_step` from an earlier life are cut off, so that a step has one line however often a run was killed."""

    def __init__(self, run_dir: Path, resume_step: int = 0, every: int | None = None):
        """`every`: the steps from one line to the next; the log names a larger gap before `resume_step`."""
        self._file: Lines | None = None
        if rank() != 0:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        _cut(run_dir / FILE, resume_step)
        if resume_step and every is not None:
            _name_holes(run_dir / FILE, resume_step, every)
        self._file = Lines(run_dir / FILE)
        self._board = _Board(run_dir, resume_step)
        sync(run_dir)

    def write(self, step: int, values: dict[str, float | int | None]) -> None:
        """Writes one line. Floats read back to the same bits; NaN and infinity become null."""
        if self._file is None:
            return
        line: dict[str, float | int | None] = {"step": step}
        for name, value in values.items():
            finite = value is None or math.isfinite(value)
            if not finite:
                log.warning("step %d: %s is %s; %s says null", step, name, value, FILE)
            line[name] = value if finite else None
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._board.write(step, {name: value for name, value in line.items() if value is not None and name != "step"})

    def show(self, step: int, values: dict[str, float]) -> None:
        """Shows figures that have a file of their own, such as evals.jsonl, in TensorBoard and W&B only."""
        if self._file is not None:
            self._board.write(step, values)

    def sync(self) -> None:
        """Makes sure that the lines so far survive the loss of this node."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._board.close()
            self._file = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Board:
    """TensorBoard's file, and the run at Weights & Biases if one is wanted. metrics.jsonl has all that they have: if
    one of them cannot be written, the log says so once, and the run goes on without it."""

    def __init__(self, run_dir: Path, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.directory, self._failed = run_dir / "tensorboard", False
        self._wandb = WandbRun(run_dir, mode) if (mode := chosen_mode()) else None
        self._writer: Any = None
        self._hook, threading.excepthook = threading.excepthook, self._thread_ends
        with self._lose():
            self._writer = SummaryWriter(str(self.directory), purge_step=resume_step + 1, flush_secs=10)

    def write(self, step: int, values: dict[str, float | int]) -> None:
        with self._lose():
            for name, value in values.items() if self._writer else ():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, values)

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.close()
        with self._lose():
            if self._writer:
                self._writer.close()
            if self._failed and self._writer:  # the writer's thread failed after the last `write`
                raise OSError(errno.EIO, "its end is missing")
        threading.excepthook = self._hook

    @contextmanager
    def _lose(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.warning("%s cannot be written: %s; metrics.jsonl has all of it", self.directory, error.strerror)
            self._writer = None

    def _thread_ends(self, args: threading.ExceptHookArgs) -> None:
        """The excepthook of threads: notes an OSError of TensorBoard's writer, which its next write raises again."""
        if isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard."):
            self._failed = True
        else:
            self._hook(args)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. An incomplete last line is left out: the run was killed, or is just writing it.
    Raises ValueError for any other line that is not a JSON object with a step."""
    lines = []
    for number, raw in enumerate(_whole_lines(read_bytes(path, _MAX_BYTES)), start=1):
        line = _parse(raw)
        if line is None:
            raise ValueError(f"{path} line {number} is not a JSON object with a step; is this file of another program?")
        lines.append(line)
    return lines


def last_step(run_dir: Path) -> int:
    """The step of the last complete line of `run_dir`/metrics.jsonl; 0 if there is none."""
    try:
        with (Path(run_dir) / FILE).open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 2**16, 0))
            tail = _whole_lines(file.read())
    except OSError:
        return 0
    line = _parse(tail[-1]) if tail else None
    return line["step"] if line else 0


def _whole_lines(data: bytes) -> list[bytes]:
    return data[: data.rfind(b"\n") + 1].splitlines()


def _parse(raw: bytes) -> dict[str, Any] | None:
    try:
        line = parse_json(raw)
    except ValueError:
        return None
    good = isinstance(line, dict) and isinstance(line.get("step"), int)
    return line if good else None


def _name_holes(path: Path, resume_step: int, every: int) -> None:
    """Warns of steps without a line, which a node took with it that was lost before it had synced them."""
    steps = [0, *(line["step"] for line in read_metrics(path))] if path.exists() else [0]
    gaps = list(itertools.pairwise([*steps, resume_step + 1]))
    # An earlier life may have had a larger log_every, which makes no gap.
    usual = max([every, *([statistics.median_low(b - a for a, b in gaps[:-1])] if gaps[:-1] else [])])
    holes = [f"{before + 1} to {after - 1}" for before, after in gaps if after - before > usual]
    if holes:
        more = f" and {len(holes) - 1} other places" if len(holes) > 1 else ""
        log.warning(
            "%s has no line of the steps %s%s: lost with a node, or log_every was changed", path, holes[-1], more
        )


def _cut(path: Path, resume_step: int) -> None:
    """Drops the lines beyond `resume_step` and damaged ones; in one step, so that a kill changes nothing."""
    if not path.exists():
        return
    data = path.read_bytes()
    lines = []
    for raw in _whole_lines(data):
        line = _parse(raw)
        if line is not None and line["step"] <= resume_step:
            lines.append(raw + b"\n")
    new = b"".join(lines)
    if new == data:
        return
    log.info(
        "%s: %d lines up to step %d stay, %d bytes after them are dropped",
        path,
        len(lines),
        resume_step,
        len(data) - len(new),
    )
    write_file(path, new)
