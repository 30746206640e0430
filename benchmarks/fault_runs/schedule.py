"""Which faults meet a run: a pure function of the seed, the run's number and what is there to be damaged."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.fault_runs.strike import Strike
from pretrain.checkpoint.directory import MANIFEST, complete, damage


class Layout(NamedTuple):
    ranks: int
    ds: str
    workers: int = 0  # any number gives the same bits

    @property
    def name(self) -> str:
        return f"{self.ranks} rank{'s' * (self.ranks > 1)}, {self.ds.removesuffix('.json')}"


LAYOUTS = [Layout(1, "zero1.json"), Layout(2, "zero1.json"), Layout(2, "zero3.json"), Layout(1, "zero3.json")]
CHANGING = "changing layouts"
# How often a run has which layout: most have one rank, because such runs cost less.
KINDS_OF_RUN = {LAYOUTS[0].name: 20, LAYOUTS[1].name: 1, LAYOUTS[2].name: 1, CHANGING: 2}

# An event is chosen from those that have one of these words in their line. Chosen from all events alike, most would be
# writes of moments and of TensorBoard's file.
NEEDLES = (
    *("", "fsync ", "rename ", "mkdir ", "unlink", "rmdir ", "open ", "write ", "chmod ", "truncate "),
    *("/lock", "/.start_", "/.recipe.json", "/metrics.jsonl", "/samples.rank", "/tensorboard", "/moments_rank"),
    *("/random_rank", "/.weights.safetensors", "/.tmp", "/.config.json", "/.MANIFEST.json", "/.deleting_"),
    *("rename /fusion/checkpoints/.step", "/fusion/.weights.safetensors", "/fusion/.config.json"),
)
OF_OTHER_RANKS = ("", "open ", "write ", "fsync ", "/samples.rank", "/moments_rank", "/random_rank", "/.start_")
# Calls that never fail with an error: files can be removed from a full disk, and a read-only one can be synced.
CANNOT_MEET = {"ENOSPC": ("unlink", "rmdir ", "chmod ", "truncate "), "EROFS": ("fsync ",)}
WINDOW = 0.2  # the share of a whole run's events within which a fault strikes, so that a run has many lives
ERRORS = ("ENOSPC", "EIO", "EROFS", "ESTALE")
DAMAGES = ("flip", "cut", "zero", "delete", "extra")


class Life(NamedTuple):
    """One start of the run: until a strike ends it, or the run is finished."""

    layout: Layout
    kind: str  # of the strike; "" where nothing is to strike
    strike: Strike | None
    rank: int


class Alone(NamedTuple):
    """A run that nothing struck: its stage's directory, and the lines that each rank has in its log of events."""

    stage: Path
    events: list[list[str]]


class Schedule:
    """The lives of one run. `alone` gives the run of a layout that nothing struck: its events tell where to strike."""

    def __init__(self, seed: int, run: int, alone: Callable[[Layout], Alone]):
        self.dice, self.alone = random.Random(f"{seed}/{run}"), alone
        names = list(KINDS_OF_RUN)
        self.name = self.dice.choices(names, list(KINDS_OF_RUN.values()))[0]
        self.layouts = [layout for layout in LAYOUTS if self.name in (layout.name, CHANGING)]

    def life(self) -> Life:
        layout = self.dice.choice(self.layouts)
        rank = self.dice.randrange(layout.ranks)
        kind = self.dice.choices(["kill", "errno", "signal"], [5, 3, 1])[0]
        strike = {"kill": self._kill, "errno": self._errno, "signal": self._signal}[kind](layout, rank)
        return Life(layout._replace(workers=int(self.dice.random() < 0.15)), kind, strike, rank)

    def damage(self, checkpoints: Path) -> tuple[Path, str] | None:
        """Damages the newest checkpoint now and then, if it is a good one -> its path, and what was done to it."""
        if self.dice.random() > 0.3:
            return None
        newest = next(complete(checkpoints), None)
        if newest is None or damage(checkpoints / newest[0], newest[1]["files"]):
            return None
        path, names = checkpoints / newest[0], [MANIFEST, *sorted(newest[1]["files"])]
        return path, hurt(path / self.dice.choice(names), self.dice.choice(DAMAGES), self.dice)

    def _event(self, layout: Layout, rank: int, but: tuple[str, ...] = ()) -> tuple[int, str]:
        needle = self.dice.choice([each for each in (OF_OTHER_RANKS if rank else NEEDLES) if each not in but])
        events = self.alone(layout).events[rank]
        near = sum(needle in line for line in events[: int(WINDOW * len(events))])
        return self.dice.randint(1, near or max(sum(needle in line for line in events), 1)), needle

    def _kill(self, layout: Layout, rank: int) -> Strike:
        if self.dice.random() < 0.2:  # at a moment of a step, wherever it is then
            lines = [line for line in self.alone(layout).events[rank] if "write /fusion/samples.rank" in line]
            step = self.dice.randint(1, max(int(WINDOW * len(lines)), 1))
            later = self.dice.randrange(60_000)
            return Strike(step, "write /fusion/samples.rank", "SIGKILL", when="later", delay_us=later)
        when = self.dice.choice(["before", "amid", "after"])
        return Strike(*self._event(layout, rank), "SIGKILL", when=when)

    def _errno(self, layout: Layout, rank: int) -> Strike:
        error, when = self.dice.choice(ERRORS), self.dice.choice(["before", "amid"])
        event = self._event(layout, rank, CANNOT_MEET.get(error, ()))
        return Strike(*event, error=error, when=when, stays=self.dice.random() < 0.5)

    def _signal(self, layout: Layout, rank: int) -> Strike:
        return Strike(*self._event(layout, rank), self.dice.choice(["SIGTERM", "SIGUSR1"]))


def hurt(file: Path, how: str, dice: random.Random) -> str:
    """Damages a file of a checkpoint -> what was done to it."""
    content = bytearray(file.read_bytes())
    if how == "extra":
        copy = file.with_name(f"{file.stem}.copy{file.suffix}")
        copy.write_bytes(content[: len(content) // 2])
        return f"extra {copy.name}"
    if how == "delete":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: dice.randrange(len(content))])
    elif how == "zero":  # a block that the disk never wrote
        start = dice.randrange(len(content))
        if not any(content[start : start + 512]):
            start = 0
        content[start : start + 512] = bytes(len(content[start : start + 512]))
        file.write_bytes(content)
    else:
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
    return f"{how} {file.name}"
