"""The lives of a stage: lives.jsonl has a line when a job begins to work on it and one when it stops, and says why;
between them one when other ranks are slow than before.

A life without a second line was ended from outside: it was killed, lost its node, or waited too long for another rank.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from pretrain.distributed import rank, world_size
from pretrain.json_files import parse_json, read_bytes, typed

LIVES = "lives.jsonl"
KILLED = "killed, or its node or another rank was lost (no end was written)"


@dataclass(frozen=True)
class Life:
    """From `begun` to `ended` (seconds since 1970; None: no end was written), from step `start` on. `repeated`: steps
    that the life before it had done and not saved."""

    begun: float
    start: int
    repeated: int
    ranks: int
    host: str
    job: str  # of SLURM, or ""
    ended: float | None = None
    reason: str = ""
    slow: str = ""  # the ranks that the others waited for, as was noted last; "": none


class ThisLife:
    """Writes the two lines of the life that begins now, on rank 0 only. `reached`: the last step of the life before;
    `reason`: why this one ends, where no exception says it. OSError where `directory` cannot be written."""

    def __init__(self, directory: Path, start: int, reached: int):
        self._path, self.reason = directory / LIVES, "finished"
        place = {"ranks": world_size(), "host": socket.gethostname(), "job": os.environ.get("SLURM_JOB_ID", "")}
        self._write("begun", start=start, repeated=max(reached - start, 0), **place)

    def __enter__(self) -> ThisLife:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        reason = self.reason if kind is None else f"{kind.__name__}: {error}".partition("\n")[0]
        try:
            self._write("ended", reason=reason)
        except OSError:  # the disk is full or gone: what ends the life says more than a failure to note it
            if kind is None:
                raise

    def _write(self, event: str, **values: Any) -> None:
        if rank() == 0:
            _append(self._path, event, **values)


def note_slow(directory: Path, text: str) -> None:
    """For rank 0, which has named the slow ranks in its log too: a full disk is told by what must be written."""
    with suppress(OSError):
        _append(directory / LIVES, "slow", text=text)


def _append(path: Path, event: str, **values: Any) -> None:
    line = json.dumps({"event": event, "time": time.time(), **values}).encode() + b"\n"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def read_lives(directory: Path) -> list[Life]:
    """The lives so far, oldest first; [] where none was noted. Lines that are damaged are left out."""
    try:
        raw = read_bytes(directory / LIVES)
    except (OSError, ValueError):
        return []
    lives: list[Life] = []
    for line in raw.splitlines():
        try:
            entry = parse_json(line)
            when = typed(entry, "time", float)
            if (event := typed(entry, "event", str)) == "begun":
                counts = [typed(entry, name, int) for name in ("start", "repeated", "ranks")]
                place = [typed(entry, name, str) for name in ("host", "job")]
                lives.append(Life(when, counts[0], counts[1], counts[2], place[0], place[1]))
            elif event == "slow" and lives:
                lives[-1] = replace(lives[-1], slow=typed(entry, "text", str))
            elif lives and lives[-1].ended is None:
                lives[-1] = replace(lives[-1], ended=when, reason=typed(entry, "reason", str))
        except ValueError:
            continue
    return lives
