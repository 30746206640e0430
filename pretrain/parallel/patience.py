"""How long a part of a run may take before somebody asks whether it hangs: learned from how long it took before."""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
from pathlib import Path

# Before enough is known, and at the start and the end of a run, which load, compile and write.
PATIENCE_S = 600.0
# After so many parts of a kind the limit is FACTOR times the longest of the last RECENT ones, but never below a floor.
KNOWN, RECENT, FACTOR = 3, 50, 3.0
# A step may be lengthened by a busy network or file system for seconds; a shard may have to be fetched, and a full
# file system be waited for: a new start would help neither.
STEP_S, READING_S, OTHER_S = 20.0, 300.0, 120.0
FLOORS_S = {"step": STEP_S, "the reading of step": READING_S}
# Where torch compiles; what it has compiled runs elsewhere.
COMPILING = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")


class Patience:
    """The limits of one rank. A part is known by its name without numbers; one that is announced as `patient`, such as
    the first step, which compiles, is another part than its like."""

    def __init__(self) -> None:
        self._took: dict[tuple[str, bool], deque[float]] = {}

    def note(self, doing: str, patient: bool, seconds: float) -> None:
        """The part `doing` is over, and took so long."""
        self._took.setdefault(_kind(doing, patient), deque(maxlen=RECENT)).append(seconds)

    def limit_s(self, doing: str, patient: bool) -> float:
        kind = _kind(doing, patient)
        took = self._took.get(kind, ())
        if len(took) < KNOWN:
            return PATIENCE_S
        return max(FLOORS_S.get(kind[0], OTHER_S), FACTOR * max(took))


def _kind(doing: str, patient: bool) -> tuple[str, bool]:
    return re.sub(r"\s*\d+", "", doing), patient


def has_reason_to_wait() -> bool:
    """Whether the main thread waits for a disk or a file system over the network (state D of Linux), or a thread
    compiles: what takes long then is no hang, and to start again would not help."""
    try:
        told = Path(f"/proc/self/task/{threading.main_thread().native_id}/stat").read_text()
    except OSError:
        told = ""
    return told.rpartition(")")[2].split()[:1] == ["D"] or _compiles()


def _compiles() -> bool:
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_filename.endswith(COMPILING):
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False
