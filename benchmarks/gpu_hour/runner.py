"""Runs cells one after another, each in a process of its own, and writes down after each what came of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu_hour.cells import Cell
from benchmarks.record import machine
from pretrain.files import write_json
from pretrain.json_files import read_json

ROOT = Path(__file__).parents[2]
LEAST_S = 20  # a cell is not begun with less time: it would end before its first figure
GRACE_S = 10  # from SIGTERM to SIGKILL
LAST_WORDS = 3000  # characters that are kept of what a failed cell said last
CUT = "cut off: the part's time was over"


def here(toy: bool) -> dict[str, Any]:
    """What the figures of one file have in common. nvidia-smi is asked, because torch would take memory of the GPU."""
    ask = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpus = []
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(ask, capture_output=True, text=True, timeout=60, check=False)
        gpus = done.stdout.split("\n")[:-1] if done.returncode == 0 else []
    return {"gpus": gpus, **machine("torch", "deepspeed"), "toy": toy}


class Results:
    """The file of a part: {"part", "machine", "cells": {name: {"command", "ended", "seconds", "result" or "said"}}}.
    `ended` is the exit code, or why there is none."""

    def __init__(self, path: Path, part: str, toy: bool):
        """Raises ValueError for a file that is not one of this part, or that holds figures of another machine."""
        self.path, facts = path, here(toy)
        self._value: dict[str, Any] = {"part": part, "machine": facts, "cells": {}}
        if path.exists():
            self._value = _checked(path, part)
            other = self._value["machine"]
            if other != facts:
                raise ValueError(
                    f"{path} holds figures of another machine or size ({_differs(other, facts)}), which are not to be "
                    "mixed with these; use another --out"
                )

    def of(self, cell: Cell, words: list[str]) -> dict[str, Any] | None:
        """The result of the cell; None where it has none, or where its line was another one then."""
        result = self._value["cells"].get(cell.name)
        return result if result and result.get("command") == words else None

    def put(self, cell: Cell, value: dict[str, Any]) -> None:
        self._value["cells"][cell.name] = value
        write_json(self.path, self._value)


def _checked(path: Path, part: str) -> dict[str, Any]:
    value = read_json(path)
    whole = isinstance(value, dict) and isinstance(value.get("machine"), dict) and isinstance(value.get("cells"), dict)
    if not whole or value.get("part") != part or not all(isinstance(each, dict) for each in value["cells"].values()):
        raise ValueError(f"{path} is no file of the part {part}; move it away, or use another --out")
    return value


def _differs(other: dict[str, Any], facts: dict[str, Any]) -> str:
    names = [name for name in {**facts, **other} if other.get(name) != facts.get(name)]
    return ", ".join(f"{name}: {other.get(name)} there, {facts.get(name)} here" for name in names)


def run_cells(
    cells: Sequence[Cell], results: Results, logs: Path, seconds: float, toy: bool, tell: Callable[[str], None]
) -> dict[str, bool]:
    """Runs what is not done yet, within `seconds`: in their order those that were never tried or were cut off, then
    those that failed. Returns those that are not done then, and whether they failed."""
    end = time.monotonic() + seconds
    open_cells = [(cell, cell.words(toy)) for cell in cells]
    open_cells = [(cell, words) for cell, words in open_cells if not _done(results.of(cell, words))]
    open_cells.sort(key=lambda each: _failed(results.of(*each)))
    for cell, words in open_cells:
        left = end - time.monotonic()
        if left < LEAST_S:
            break
        value = run_cell(cell, words, logs, left)
        results.put(cell, value)
        tell(summary(cell, value))
    after = {cell.name: results.of(cell, words) for cell, words in open_cells}
    return {name: _failed(value) for name, value in after.items() if not _done(value)}


def _done(value: dict[str, Any] | None) -> bool:
    return value is not None and value.get("ended") == 0


def _failed(value: dict[str, Any] | None) -> bool:
    return value is not None and value.get("ended") not in (0, CUT)


def run_cell(cell: Cell, words: list[str], logs: Path, left_s: float) -> dict[str, Any]:
    """Runs a cell for at most `left_s` seconds -> its entry of `Results`. Its output goes to a file in `logs`."""
    logs.mkdir(parents=True, exist_ok=True)
    name = cell.name.replace(" ", "_").replace(",", "")
    log, out = logs / f"{name}.log", logs / f"{name}.json"
    out.unlink(missing_ok=True)
    begin, limit = time.monotonic(), min(cell.limit_s, left_s)
    with log.open("wb") as said:
        line = [sys.executable, "-m", *words, "--out", str(out.absolute())]
        process = subprocess.Popen(
            line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
        )
        try:
            ended: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            ended = f"ended after its limit of {cell.limit_s} s" if limit == cell.limit_s else CUT
        finally:
            end_group(process)
    value: dict[str, Any] = {"command": words, "date": date.today().isoformat(), "ended": ended}
    value["seconds"] = round(time.monotonic() - begin, 1)
    if out.exists():
        with suppress(ValueError):  # half a file of a process that was killed
            value["result"] = read_json(out)
    if ended == 0 and "result" not in value:
        value["ended"] = "ended without a result"
    if value["ended"] != 0:
        value["said"] = last_words(log)
    return value


def end_group(process: subprocess.Popen) -> None:
    """Its workers and ranks too; SIGTERM first, so that a launcher ends what it has started in other groups."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_words(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - LAST_WORDS, 0))
        return file.read().decode(errors="replace")


FIGURES = ("samples_per_s", "mfu", "mfu_real", "mfu_executed", "memory_gib", "planned_memory_gib", "passed", "failed")


def summary(cell: Cell, value: dict[str, Any]) -> str:
    """One line: the honest share of the peak (`mfu_real`) stands beside the one that counts padding."""
    ended, result = value["ended"], value.get("result", {})
    known = {name: result[name] for name in FIGURES if isinstance(result.get(name), int | float)}
    said = ", ".join(f"{name} {figure:.4g}" for name, figure in known.items())
    if ended != 0:
        code = f"exit code {ended}" if isinstance(ended, int) else ended
        last = (value["said"].strip().splitlines() or ["it said nothing"])[-1]
        said = f"{code}: {said or last}"
    return f"{cell.name}: {said or 'done'} ({value['seconds']:.0f} s)"


def as_json(cells: Sequence[Cell], toy: bool) -> str:
    """The lines of cells, to read or to run by hand."""
    return json.dumps({cell.name: " ".join(["python -m", *cell.words(toy)]) for cell in cells}, indent=1)
