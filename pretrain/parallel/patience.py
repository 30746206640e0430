"""How long a part of a run may take before it is suspected to hang, learned from how long such parts took before."""

from __future__ import annotations

import re
import sys
import threading
from collections import deque
from pathlib import Path

# The limit before enough is known, and at the start and the end of a run, which load, compile and write.
PATIENCE_S = 600.0
# After KNOWN parts of a kind the limit is FACTOR times the longest of the last RECENT ones, but never below a floor.
KNOWN, RECENT, FACTOR = 3, 50, 3.0
# The floors. A busy network or file system may lengthen a step by seconds, and a shard may have to be downloaded: a new
# start would not help.
STEP_S, READING_S, OTHER_S = 20.0, 300.0, 120.0
FLOORS_S = {"step": STEP_S, "the reading of step": READING_S}
# Files in which torch compiles; compiled code runs elsewhere.
COMPILING = ("torch/_dynamo/convert_frame.py", "torch/_inductor/compile_fx.py")


class Patience:
    """The limits of one rank. Parts are of the same kind if their names without numbers are equal and both or neither
    are `patient`, as the first step is, which compiles."""

    def __init__(self) -> None:
        self._took: dict[tuple[str, bool], deque[float]] = {}

    def note(self, doing: str, patient: bool, seconds: float) -> None:
        """Notes that the part `doing` is over and took `seconds`."""
        self._took.setdefault(_kind(doing, patient), deque(maxlen=RECENT)).append(seconds)

    def limit_s(self, doing: str, patient: bool) -> float:
        """How long the part `doing` may take, in seconds."""
        kind = _kind(doing, patient)
        took = self._took.get(kind, ())
        if len(took) < KNOWN:
            return PATIENCE_S
        return max(FLOORS_S.get(kind[0], OTHER_S), FACTOR * max(took))


def _kind(doing: str, patient: bool) -> tuple[str, bool]:
    return re.sub(r"\s*\d+", "", doing), patient


def has_reason_to_wait() -> bool:
    """Whether the main thread waits for a disk or a network file system (state D of Linux), or any thread compiles:
    then it does not hang, and a new start would not help."""
    try:
        stat = Path(f"/proc/self/task/{threading.main_thread().native_id}/stat").read_text()
    except OSError:
        stat = ""
    return stat.rpartition(")")[2].split()[:1] == ["D"] or _compiles()


def _compiles() -> bool:
    """Whether a thread of this process is inside torch's compiler."""
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code.co_filename.endswith(COMPILING):
                return True
            frame = frame.f_back  # type: ignore[assignment]
    return False
