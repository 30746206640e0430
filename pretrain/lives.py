"""The lives of a stage: lives.jsonl gets a line when a job begins to work on it, one when it stops, with the reason,
and between them one whenever the slow ranks change.

A life without a line for its end was ended from outside: it was killed, lost its node, or waited too long for another
rank.
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
    """One job's work on a stage."""

    begun: float  # seconds since 1970
    start: int  # the last step that was saved before it
    repeated: int  # steps that the life before had done but not saved
    ranks: int
    host: str
    job: str  # SLURM's job, or ""
    ended: float | None = None  # seconds since 1970; None: no end was written
    reason: str = ""
    slow: str = ""  # the ranks for which the others waited, as noted last; "": none


class ThisLife:
    """Writes the first and the last line of the life that begins now, on rank 0 only. `reached`: the last step of the
    life before. The attribute `reason` says why this life ends, unless an exception does. OSError if `directory` cannot
    be written."""

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
        except OSError:  # an exception that ends the life says more than a failure to note its end
            if kind is None:
                raise

    def _write(self, event: str, **values: Any) -> None:
        if rank() == 0:
            _append(self._path, event, **values)


def note_slow(directory: Path, text: str) -> None:
    """Notes the slow ranks, on rank 0. An OSError is ignored: the log names them too, and whatever must be written
    reports a full disk."""
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
    """The lives so far, oldest first; [] if none was noted. Damaged lines are left out."""
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
