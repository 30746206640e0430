"""Runs img2dataset on a slice until every shard exists: watches it, shows its progress, restarts it when it fails.

A killed worker, a stalled run or a shard with missing rows leads to another attempt, which makes only the missing
shards. Several attempts in a row without a new shard are an error that says why.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_tools.fetch.guarded_fetch import Limits
from data_tools.fetch.reasons import SUCCESS
from data_tools.fetch.slices import Slice, SliceShards
from pretrain.json_files import read_object, whole_numbers
from pretrain.visible import say

WORKER_DIED = 70  # exit code of data_tools.fetch.guarded_img2dataset
ROOT = Path(__file__).parents[2]
_POLL = 0.25  # seconds
_PLAIN_EVERY = 30.0  # seconds between lines where there is no terminal
_SHOWN = 4  # reasons
_DISK_FULL = ("No space left on device", "Disk quota exceeded")
_LEAST_FREE = 2**20  # bytes; with less, pictures no longer fit


@dataclass(frozen=True)
class Run:
    """How to run img2dataset."""

    python: str
    img2dataset: dict[str, Any]  # arguments of img2dataset.download
    limits: Limits
    max_pixels: int
    stall_seconds: float = 300.0
    attempts: int = 3  # without a new shard


class DiskFull(OSError):
    def __init__(self, out: Path):
        super().__init__(errno.ENOSPC, "is full; free some space and run the same command to continue", str(out))


def download_slice(run: Run, shards: SliceShards) -> Counter[str]:
    """Makes the missing shards of a slice. -> the outcome of all its rows. Raises OSError if it fails."""
    for attempt in shards.part.work.glob("attempt-*"):  # of a killed run
        shards.publish(attempt)
        shutil.rmtree(attempt, ignore_errors=True)
    log = shards.part.work / "log.txt"
    fruitless = 0
    with _bar(shards.listed.kept, shards.counts(), shards.part) as bar:
        while before := len(shards.missing()):
            shards.remove_incomplete()
            why, hopeless = _attempt(run, shards, bar, log)
            missing = shards.missing()
            if not missing:
                break
            fruitless = fruitless + 1 if len(missing) == before else 0
            if fruitless and (hopeless or fruitless == run.attempts):
                if "No module named" in why:
                    why += "; bash launch/env/download.sh makes or mends its environment"
                raise OSError(
                    f"{len(missing)} of {len(shards.numbers)} shards are missing ({_some(missing)}): {why}; finished "
                    f"shards stay, run the same command to continue; img2dataset's own output is in {log}"
                )
            bar.note(f"{why}; continuing with the {len(missing)} missing shards")
    return shards.counts()


def _attempt(run: Run, shards: SliceShards, bar: _Progress, log: Path) -> tuple[str, bool]:
    """One run of img2dataset in a directory of its own. -> why it ended, and whether another attempt is hopeless."""
    part = shards.part
    attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=part.work))
    (attempt / "live").mkdir()
    start = log.stat().st_size if log.exists() else 0
    arguments = {"url_list": str(part.list), "output_folder": str(attempt), "oom_shard_count": shards.listed.digits}
    settings = {
        "img2dataset": run.img2dataset | arguments | {"number_sample_per_shard": part.samples_per_shard},
        "limits": asdict(run.limits),
        "max_pixels": run.max_pixels,
        "first": shards.listed.first,
        "done": shards.published(),
    }
    bar.reset()
    try:
        with _process(run, log) as process:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(settings).encode() + b"\n")
                process.stdin.flush()
            except BrokenPipeError:  # it ended before it read; its log says why
                pass
            why = _watch(run, process, attempt, shards, bar, log, start)
        bar.publish(shards.publish(attempt))
    finally:
        shutil.rmtree(attempt, ignore_errors=True)
    # It ended by itself before the first picture, so the environment is broken.
    hopeless = process.returncode not in (0, WORKER_DIED, -signal.SIGKILL) and not bar.tried
    bar.reset()
    return why, hopeless


@contextmanager
def _process(run: Run, log: Path) -> Iterator[subprocess.Popen]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
        "NO_ALBUMENTATIONS_UPDATE": "1",
        "WANDB_MODE": "disabled",
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(run.max_pixels),
        # A name server that does not answer must not block a thread for minutes.
        "RES_OPTIONS": os.environ.get("RES_OPTIONS", "timeout:3 attempts:2"),
    }
    with log.open("ab") as output:
        process = subprocess.Popen(
            [run.python, "-m", "data_tools.fetch.guarded_img2dataset"],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that its workers end with it, and Ctrl-C reaches this process first
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _watch(
    run: Run, process: subprocess.Popen, attempt: Path, shards: SliceShards, bar: _Progress, log: Path, start: int
) -> str:
    """Waits until img2dataset ends or stalls. -> why. Raises DiskFull."""
    out, tried, since = shards.part.out, -1, time.monotonic()
    while True:
        code = process.poll()
        bar.publish(shards.publish(attempt))
        bar.show(_live(attempt))
        output = _output(log, start)
        if any(sign in output for sign in _DISK_FULL) or shutil.disk_usage(out).free < _LEAST_FREE:
            raise DiskFull(out)
        if code is not None:
            return f"img2dataset ended with code {code}" + (f" ({_last_line(output)})" if code or output else "")
        if bar.tried != tried:
            tried, since = bar.tried, time.monotonic()
        elif time.monotonic() - since > run.stall_seconds:
            return f"no picture was fetched for {run.stall_seconds:g} s (--stall-seconds)"
        time.sleep(_POLL)


def _live(attempt: Path) -> Counter[str]:
    """The workers' counts since the attempt started."""
    counts: Counter[str] = Counter()
    for path in (attempt / "live").glob("*"):
        if path.suffix:  # it is being written
            continue
        try:
            counts.update(whole_numbers(read_object(path)))
        except (OSError, ValueError):
            continue
    return counts


def _output(log: Path, start: int) -> str:
    """The end of this attempt's output."""
    try:
        with log.open("rb") as file:
            file.seek(max(start, file.seek(0, os.SEEK_END) - 2**16))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _last_line(output: str) -> str:
    lines = [line.strip() for line in output.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it wrote nothing"


def _some(shards: list[int]) -> str:
    return ", ".join(map(str, shards[:5])) + (", ..." if len(shards) > 5 else "")


@contextmanager
def _bar(rows: int, counts: Counter[str], part: Slice) -> Iterator[_Progress]:
    description = f"downloading {part.out}" + (f" slice {part.number}/{part.slices}" if part.slices > 1 else "")
    with tqdm(total=rows, initial=counts.total(), desc=description, unit=" img", disable=None) as bar:
        yield _Progress(bar, counts, rows, description)


class _Progress:
    """The number of pictures tried: a bar on a terminal, otherwise a line every now and then."""

    def __init__(self, bar: tqdm, counts: Counter[str], rows: int, description: str):
        self._bar, self._rows, self._description = bar, rows, description
        self._counts = Counter(counts)  # of the shards that are done
        self._published: Counter[str] = Counter()  # of these, the shards of this attempt
        self._first, self._start = counts.total(), time.monotonic()
        self._line = time.monotonic()
        self.tried = 0  # pictures, in this attempt

    def reset(self) -> None:
        """At the start and the end of an attempt: pictures of unfinished shards no longer count."""
        self._published.clear()
        self.tried = 0
        self._set(self._counts)

    def publish(self, counts: Counter[str]) -> None:
        self._counts += counts
        self._published += counts

    def show(self, live: Counter[str]) -> None:
        """`live`: all counts of this attempt, including unfinished shards."""
        self.tried = max(self.tried, live.total(), self._published.total())
        # The workers' files may lag behind the shards.
        self._set(self._counts + (live - self._published))

    def _set(self, counts: Counter[str]) -> None:
        text = _summary(counts)
        if not self._bar.disable:
            self._bar.n = min(counts.total(), self._rows)
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._line > _PLAIN_EVERY:
            self._line = time.monotonic()
            speed = (counts.total() - self._first) / (time.monotonic() - self._start)
            self._say(f"{counts.total():,} of {self._rows:,} pictures tried, {speed:.0f} img/s, {text}")

    def note(self, text: str) -> None:
        self._bar.clear()
        self._say(text)

    def _say(self, text: str) -> None:
        say(f"{self._description}: {text}", error=True)


def _summary(counts: Counter[str]) -> str:
    tried = counts.total()
    if not tried:
        return "nothing yet"
    failed = Counter({reason: count for reason, count in counts.items() if reason != SUCCESS})
    reasons = [f"{reason} {count:,}" for reason, count in failed.most_common(_SHOWN)]
    return ", ".join([f"{100 * counts[SUCCESS] / tried:.1f} % succeeded", *reasons])
