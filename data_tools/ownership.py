"""An output directory belongs to one piece of work, and to one process at a time.

A stamp, a JSON file, says which settings the work was begun with. A lock file keeps a second process out; the kernel
lets go of it when its process ends, also by kill -9, so the same command can go on.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.files import write_json
from pretrain.lock import LOCK, this_process, try_lock

DONE = "done"  # in a stamp, beside the settings: what is to be remembered of work that has ended
_SHOWN = 60  # characters of a setting


@contextmanager
def owned(
    out: Path,
    settings: dict[str, Any],
    *,
    stamp: Path,
    work: Path,
    stranger: Callable[[], bool] = lambda: False,
    restart: Callable[[], bool] = lambda: False,
    patience: float = 0.0,
    way_out: str = "choose another --out",
) -> Iterator[Any]:
    """Makes `out` the home of the work that `settings` describe, and gives what its stamp holds as DONE.

    `work`: the directory of what is in progress, with the lock; emptied when work begins. `stranger`: whether an `out`
    without a stamp holds files of something else. `restart`: whether work of other settings may be thrown away.
    `patience`: seconds for the workers of a killed process to notice and let go of its lock. Raises ValueError if
    `out` belongs to something else, or another process is writing to it.
    """
    settings = json.loads(json.dumps(settings))  # as a stamp gives it back

    def begun() -> dict[str, Any] | None:
        """The stamp of the same work; None where it has to be begun."""
        found = _read(stamp)
        if found is None and stranger():
            raise ValueError(f"{out} holds files of something else; choose an empty directory for --out")
        changed = differences(found or {}, settings)
        if found is not None and changed and not restart():
            raise ValueError(f"{out} was begun with {changed}; go on with the same settings, or {way_out}")
        return None if changed else found

    found = begun()  # before anything is made in a directory that is not ours
    if found is not None and DONE in found:
        yield found[DONE]
        return
    with _locked(work, out, patience):
        found = begun()  # once more: the process before may have ended meanwhile
        if found is None:
            _empty(work)
            write_json(stamp, settings)
        yield found and found.get(DONE)


def end_with_parent() -> None:
    """In a worker: a killed process must leave no one behind that holds its lock, or writes beside its successor."""
    parent = multiprocessing.parent_process()

    def wait() -> None:
        assert parent is not None
        parent.join()
        os._exit(1)

    if parent is not None:
        threading.Thread(target=wait, daemon=True).start()


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between the settings of two pieces of work, in words; "" if nothing does."""
    changed = [name for name in sorted({*before, *now} - {DONE}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name}={_short(before.get(name))} (now {_short(now.get(name))})" for name in changed)


def _read(stamp: Path) -> dict[str, Any] | None:
    """{}: a damaged one."""
    try:
        found = json.loads(stamp.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


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
            raise ValueError(f"{holder} is writing to {out} ({work / LOCK}); wait for it, or end it")
        time.sleep(0.1)


def _empty(work: Path) -> None:
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
