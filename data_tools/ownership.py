"""An output directory belongs to one task, and to one process at a time.

A stamp, a JSON file, has the settings with which the task was started. A lock file keeps other processes out; the
kernel releases it when the process ends, even by kill -9, so that the same command can continue.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.files import write_json
from pretrain.json_files import read_object
from pretrain.lock import LOCK, this_process, try_lock

DONE = "done"  # in a stamp, beside the settings: the result of a finished task
_MAX_SHOWN = 60  # characters of a setting in messages


@contextmanager
def owned(
    out: Path,
    settings: dict[str, Any],
    *,
    stamp: Path,
    work: Path,
    has_other_files: Callable[[], bool] = lambda: False,
    restart: Callable[[], bool] = lambda: False,
    patience: float = 0.0,
    way_out: str = "choose another --out",
) -> Iterator[Any]:
    """Reserves `out` for the task that `settings` describe, and yields the DONE of its stamp, None if it is not done.

    `work`: the directory for unfinished files and the lock; emptied when the task starts. `has_other_files`: whether
    an `out` without a stamp contains files of something else. `restart`: whether the work of other settings may be
    deleted. `patience`: seconds for the workers of a killed process to notice and release its lock. Raises ValueError
    if `out` belongs to something else, or another process is writing to it.
    """
    settings = json.loads(json.dumps(settings))  # with the types that a stamp has

    def matching_stamp() -> dict[str, Any] | None:
        """The stamp of the same task; None if the task has to be started."""
        content = _read(stamp)
        if content is None and has_other_files():
            raise ValueError(f"{out} contains other files; choose an empty directory for --out")
        changed = differences(content or {}, settings)
        if content is not None and changed and not restart():
            raise ValueError(f"{out} was started with {changed}; continue with the same settings, or {way_out}")
        return None if changed else content

    content = matching_stamp()  # before anything is written to a directory that is not ours
    if content is not None and DONE in content:
        yield content[DONE]
        return
    with _locked(work, out, patience):
        content = matching_stamp()  # again, because another process may have finished in the meantime
        if content is None:
            _empty(work)
            write_json(stamp, settings)
        yield content and content.get(DONE)


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The differences between the settings of two tasks, in words; "" if there are none."""
    changed = [name for name in sorted({*before, *now} - {DONE}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name}={_short(before.get(name))} (now {_short(now.get(name))})" for name in changed)


def _read(stamp: Path) -> dict[str, Any] | None:
    """The stamp's content; None: it does not exist, {}: it is damaged."""
    try:
        return read_object(stamp)
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}


@contextmanager
def _locked(work: Path, out: Path, patience: float) -> Iterator[None]:
    deadline = time.monotonic() + patience
    while True:
        work.mkdir(parents=True, exist_ok=True)
        # flock: workers inherit it, so that nobody begins while those of a killed process may still write.
        with (work / LOCK).open("a+") as file:
            if try_lock(file.fileno(), work / LOCK, fcntl.flock):
                file.truncate(0)
                file.write(this_process())
                file.flush()
                yield
                return
            file.seek(0)
            holder = file.read().strip() or "another process"
        if time.monotonic() >= deadline:
            raise ValueError(f"{holder} is writing to {out} ({work / LOCK}); wait for it, or stop it")
        time.sleep(0.1)


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
