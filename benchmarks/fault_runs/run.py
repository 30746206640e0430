"""One run: lives, each under a fault, until it is finished; then it is compared with one that was left alone."""

from __future__ import annotations

import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.fault_runs.compare import ROUNDING, Ending, check_epochs, compare
from benchmarks.fault_runs.schedule import CHANGING, Alone, Layout, Life, Schedule
from benchmarks.fault_runs.strike import Strike, arm, read_events
from pretrain.checkpoint.weights import WEIGHTS
from pretrain.parallel import faults as watching
from pretrain.parallel.faults import LOST, STOPPED
from tests.distributed import CONTEXT, PRELOAD, sweep_shared_memory
from tests.small_run import Ranks, command, tokenizer_of, train_stage, write_data

STAGE = "fusion"
SETTINGS = ["steps=40", "save_every=2", "drop_path=0.1", "timeout_s=20"]
MOST_LIVES = 60
LIFE_S = 180.0  # a life that is not over then hangs
PATIENCE_S = 45.0  # how long a rank waits for one that was killed before they met: 10 minutes would be too long here
# The exit codes with which the ranks of a life may end, by the kind of its strike; "": nothing struck.
CODES = {
    "": {0},
    "kill": {-signal.SIGKILL, LOST, 0},
    "errno": {0, 2, LOST},
    "signal": {0, STOPPED, LOST},
}


class Ended(NamedTuple):
    """A life: the exit code of each rank (None: it hung), what the ranks said, how many events each had, and the call
    that was struck."""

    codes: list[int | None]
    said: str
    events: list[int]
    struck: str


def prepare(place: Path) -> Path:
    """The directory of the data, which has a trained tokenizer. It is made where it is missing."""
    data = place / "data"
    if not (data / "start" / "tokenizer" / WEIGHTS).exists():
        shutil.rmtree(data, ignore_errors=True)
        done = train_stage(write_data(data), data / "start", "tokenizer", launched=True)
        if done.returncode:
            raise ValueError(f"the tokenizer stage ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return data


def start_server() -> None:
    """Ranks are forked from a server that has imported everything, so that a life begins at once."""
    CONTEXT.set_forkserver_preload([*PRELOAD, "tests.small_run", "benchmarks.fault_runs.run"])


def live(data: Path, run: Path, life: Life) -> Ended:
    """One start of the run in the directory `run`."""
    log, notes = run.with_suffix(".log"), run.with_suffix(".events")
    for old in (log, *run.parent.glob(f"{notes.name}.*")):
        old.unlink(missing_ok=True)
    settings = [*SETTINGS, tokenizer_of(data), f"loading.workers={life.layout.workers}"]
    line = command(data, run, STAGE, *settings, ds=life.layout.ds)
    ranks = Ranks(line, data, life.layout.ranks, log, partial(_armed, run, notes, life.strike, life.rank))
    codes = ranks.wait(LIFE_S)
    ranks.kill()
    sweep_shared_memory([process.pid for process in ranks.processes])
    events = [read_events(Path(f"{notes}.{rank}")) for rank in range(life.layout.ranks)]
    return Ended(codes, log.read_text(errors="replace"), [n for n, _ in events], "".join(where for _, where in events))


def _armed(run: Path, notes: Path, strike: Strike | None, victim: int, rank: int) -> None:
    watching.PATIENCE_S = PATIENCE_S
    arm(run, Path(f"{notes}.{rank}"), strike if rank == victim else None)


def left_alone(data: Path, place: Path, layout: Layout) -> Alone:
    """The run of a layout that nothing struck. It is made where it is missing."""
    run = place / "alone" / f"{layout.ranks}_{layout.ds.removesuffix('.json')}"
    events = [Path(f"{run}.kept.{rank}") for rank in range(layout.ranks)]
    if not all(path.exists() for path in events):
        shutil.rmtree(run, ignore_errors=True)
        run.parent.mkdir(parents=True, exist_ok=True)
        ended = live(data, run, Life(layout, "", None, 0))
        if any(ended.codes):
            raise ValueError(f"a run that was left alone ended with {ended.codes}: {ended.said[-500:]}")
        for rank, path in enumerate(events):
            os.replace(f"{run.with_suffix('.events')}.{rank}", path)
    check_epochs(run / STAGE)
    return Alone(run / STAGE, [path.read_text().splitlines() for path in events])


class FaultyRun:
    """A run and what is known of its faults."""

    def __init__(self, data: Path, place: Path, number: int, schedule: Schedule):
        self.data, self.run, self.number, self.schedule = data, place / f"run_{number:04d}", number, schedule
        self.faults: list[dict[str, Any]] = []
        self.wrong: list[str] = []
        self.tracebacks = self.lives = self.events = 0
        # What the next life may meet: a damaged checkpoint and its fault, and the fault that a change of layout is.
        self._damaged: tuple[Path, dict[str, Any]] | None = None
        self._changed: dict[str, Any] | None = None
        self._layout = ""

    def finish(self, alone: Path) -> dict[str, Any]:
        """Runs life after life to the end and compares it with the run `alone` -> its line in finished.jsonl."""
        start = time.monotonic()
        shutil.rmtree(self.run, ignore_errors=True)
        finished = False
        while not finished:
            life = self.schedule.life()
            if self.lives >= MOST_LIVES:
                life = Life(life.layout, "", None, 0)
            if self.lives and self._damaged is None:
                self._damage()
            finished = self._live(life)
            if self.lives > MOST_LIVES and not finished:
                self.wrong.append("it did not come to its end")
                break
        ending = self._compare(alone) if finished else Ending(["unfinished"], 0, 0, 0.0)
        report = {"run": self.number, "layout": self.schedule.name, "lives": self.lives, "events": self.events}
        report |= {**ending._asdict(), "good": not ending.unequal}
        if finished and self.schedule.name == CHANGING:
            report["good"] = not (ending.lost or ending.repeated) and ending.apart <= ROUNDING
        report |= {"tracebacks": self.tracebacks, "wrong": self.wrong, "seconds": time.monotonic() - start}
        if report["good"] and not self.wrong:
            shutil.rmtree(self.run)  # of any other run everything stays, to be looked at
        return report | {"faults": self.faults}

    def _compare(self, alone: Path) -> Ending:
        try:
            return compare(self.run / STAGE, alone)
        except (ValueError, OSError) as error:
            self.wrong.append(f"it ended with what cannot be read: {error}")
            return Ending(["unreadable"], 0, 0, 0.0)

    def _live(self, life: Life) -> bool:
        if self._layout not in ("", life.layout.name):
            self._changed = self._note("layout", f"{self._layout} -> {life.layout.name}", False, "")
        self._layout = life.layout.name
        ended = live(self.data, self.run, life)
        self.lives, self.events = self.lives + 1, self.events + sum(ended.events)
        if life.strike is not None:
            struck = bool(ended.struck) and _met(life, ended.codes)
            self._note(life.kind, str(life.strike), struck, ended.struck)
        self._look_for_damage(ended)
        if self._changed is not None and "same samples, same losses up to rounding" in ended.said:
            self._changed["struck"], self._changed = True, None
        problem = ""
        if "Traceback" in ended.said:
            self.tracebacks += 1
            problem = "a traceback"
        elif None in ended.codes:
            problem = "a hang"
        elif not set(ended.codes) <= CODES[life.kind if ended.struck else ""]:
            problem = f"codes {ended.codes}"
        if problem:
            self.wrong.append(f"life {self.lives}: {problem} ({life.strike}, on {ended.struck})")
            shutil.copy(self.run.with_suffix(".log"), f"{self.run}.life_{self.lives}.log")
        return all(code == 0 for code in ended.codes)

    def _damage(self) -> None:
        checkpoints = self.run / STAGE / "checkpoints"
        if (self.run / STAGE / WEIGHTS).exists() or (done := self.schedule.damage(checkpoints)) is None:
            return
        path, what = done
        self._damaged = path, self._note("damage", what, False, path.name)

    def _look_for_damage(self, ended: Ended) -> None:
        """A damaged checkpoint counts when a life has met it: it was refused by name, or, where only a file was added,
        it was taken. Taken with damage it is wrong."""
        if self._damaged is None:
            return
        path, fault = self._damaged
        refused, taken = f"checkpoint rejected: {path}/" in ended.said, f"resumed from {path}" in ended.said
        if refused or taken:
            added, error_too = fault["what"].startswith("extra"), f"/{path.name}/" in ended.struck
            fault["struck"] = taken if added else refused and not error_too
            if taken and not added:
                self.wrong.append(f"life {self.lives}: resumed from a damaged checkpoint ({fault['what']})")
            self._damaged = None

    def _note(self, kind: str, what: str, struck: bool, where: str) -> dict[str, Any]:
        fault = {"kind": kind, "what": what, "struck": struck, "where": where}
        self.faults.append(fault)
        return fault


def _met(life: Life, codes: list[int | None]) -> bool:
    """Whether a strike that the process noted had its effect: the process is gone, or ended as it was asked to."""
    code = codes[life.rank]
    return {"kill": code == -signal.SIGKILL, "signal": code == STOPPED, "errno": True}[life.kind]
