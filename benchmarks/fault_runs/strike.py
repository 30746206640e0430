"""Python's side of strike.cpp: builds it, arms it in a process, and reads what it struck."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".cpp")
WHEN = ("before", "amid", "after", "later")  # in the order of strike.cpp
STRUCK = " STRUCK"


class Strike(NamedTuple):
    """What meets a process at its `event`-th file-system call on its run: a signal, or an error. With a `needle` only
    calls count that have it in their function and path, such as "fsync " or "/MANIFEST.json"."""

    event: int
    needle: str = ""
    signal: str = ""  # a name such as SIGKILL
    error: str = ""  # a name such as ENOSPC; the first call from `event` on that can fail so
    when: str = "before"  # of a signal; for an error "amid" cuts a write short and lets the next one fail
    stays: bool = False  # the error, until the process ends
    delay_us: int = 0  # of a signal that comes "later"

    def __str__(self) -> str:
        stays = ", and from then on" if self.stays else ""
        which = f" {self.needle!r}" if self.needle else ""
        return f"{self.signal or self.error} {self.when} event {self.event}{which}{stays}"


def build(place: Path) -> Path:
    """The library of strike.cpp, in the directory `place`. Raises ValueError where it cannot be built or preloaded."""
    if sys.platform != "linux":
        raise ValueError(f"this benchmark strikes the C library of Linux, and this is {sys.platform}; run it on Linux")
    compiler = shutil.which(os.environ.get("CXX") or "c++")
    if compiler is None:
        raise ValueError("there is no C++ compiler, which this benchmark needs; install one, or set CXX to yours")
    library = place / "strike.so"
    line = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{compiler} cannot build {SOURCE}: {done.stderr.strip().splitlines()[0]}")
    return library


def preload(library: Path) -> None:
    """Processes that are started from now on have the library in them."""
    os.environ["LD_PRELOAD"] = str(library)


def arm(run: Path, log: Path, strike: Strike | None) -> None:
    """Called in the process that is to be struck. Calls on `run` and on what lies in it are events, noted in `log`."""
    strike = strike or Strike(0)
    number = int(getattr(signal, strike.signal)) if strike.signal else 0
    error = int(getattr(errno, strike.error)) if strike.error else 0
    failed = ctypes.CDLL(None).strike_arm(
        *(os.fsencode(run), strike.needle.encode(), os.fsencode(log), ctypes.c_long(strike.event), number, error),
        *(WHEN.index(strike.when), int(strike.stays), ctypes.c_long(strike.delay_us)),
    )
    if failed:
        raise OSError(failed, os.strerror(failed), str(log))


def read_events(log: Path) -> tuple[int, str]:
    """How many events there were, and the first that was struck (function and path); '' where none was."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    struck = [line.removesuffix(STRUCK).partition(" ")[2] for line in lines if line.endswith(STRUCK)]
    return len(lines), struck[0] if struck else ""
