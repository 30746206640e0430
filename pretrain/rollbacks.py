"""A run that diverges goes back to a checkpoint, and passes over the batches on which it diverged.

rollbacks.json in the stage's directory lists when it did, and which batches it passes over: the order of its data is a
pure function of the manifest, the seed and this list. An entry is written before the run ends for the rollback; the
next start removes the later checkpoints, and notes in the entry that it has.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pretrain.files import write_json
from pretrain.json_files import read_object, typed

ROLLBACKS = "rollbacks.json"
MOST_BATCHES = 2**48  # no run has so many


@dataclass(frozen=True)
class RollbackRule:
    """When a run goes back, and how far.

    It goes back after more than max_skipped_steps steps in a row whose gradients or loss are not finite, or after
    `spikes` steps in a row whose gradient norm is a spike. PaLM (Chowdhery et al. 2022, section 5.1) went back by hand,
    to a checkpoint about 100 steps before a spike of the loss, and passed over 200 to 500 batches. `window` and
    `spikes` are those of LLM Foundry's KillLossSpike (patience=4), which compares the loss with twice the mean. Here
    the norm is compared, which every rank knows anyway, and with the median, which a spike does not move.
    """

    most: int = 0  # how often a run may go back; after that, and with 0 at once, it ends
    before: int = 100  # how many steps before the first bad one are passed over too
    after: int = 100  # how many batches behind the last bad one are passed over
    spike: float = 0.0  # a norm above this times the median of the last `window` norms is a spike; 0: none is
    spikes: int = 5
    window: int = 100

    def __post_init__(self) -> None:
        for name, least in {"most": 0, "before": 0, "after": 0, "spikes": 1, "window": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"rollback.{name}={getattr(self, name)} is below {least}; use {least} or more")
        if self.spike != 0 and not self.spike > 1:
            raise ValueError(
                f"rollback.spike={self.spike} is wrong; use a factor above 1, such as 10, or 0 to look for no spikes"
            )


@dataclass(frozen=True)
class Rollback:
    """One rollback."""

    step: int  # the last bad step
    to: int  # the step to which the run went back
    first: int  # from there on it passes over the batches first to last, in numbers of the order of all batches
    last: int
    why: str
    time: float  # seconds since 1970
    done: bool = False  # whether the later checkpoints have been removed


def read_rollbacks(directory: Path) -> tuple[Rollback, ...]:
    """The rollbacks of a run, oldest first; () if it never went back. ValueError if the file is damaged: without it the
    run would read other data."""
    path = directory / ROLLBACKS
    try:
        entries = typed(read_object(path), "rollbacks", list)
        return tuple(_entry(entry) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):  # run/directory.take_directory reports what is wrong with the place
        return ()
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({str(error).removeprefix(f'{path} ')}), and the order of this run's data depends on "
            "it; restore it, or start again in another --run-dir"
        ) from None


def write_rollbacks(directory: Path, rollbacks: tuple[Rollback, ...]) -> None:
    """Writes the list in one step. OSError."""
    write_json(directory / ROLLBACKS, {"rollbacks": [asdict(each) for each in rollbacks]})


def passed_batches(rollbacks: tuple[Rollback, ...]) -> tuple[tuple[int, int], ...]:
    """(first, last) of each run of batches that are passed over: rising, with no two that touch."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted((each.first, each.last) for each in rollbacks):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return tuple(merged)


def _entry(entry: object) -> Rollback:
    numbers = [typed(entry, name, int) for name in ("step", "to", "first", "last")]
    step, to, first, last = numbers
    if not 0 <= to < step or not 0 < first <= last < MOST_BATCHES:
        raise ValueError(f"an entry goes from step {step} to {to}, past the batches {first} to {last}")
    why, time, done = typed(entry, "why", str), typed(entry, "time", float), typed(entry, "done", bool)
    return Rollback(step, to, first, last, why, time, done)
