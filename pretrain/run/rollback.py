"""Going back when a run diverges: the decision, which ends this life of the run, and the clean-up at the next start.

The process ends, so that a launcher starts the same command again, instead of loading the checkpoint into its live
engine: a start is the one path that is right for every ZeRO stage, tensor and pipeline ranks, teachers, queues and
codebooks, and for a run that has saved nothing yet.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from pretrain.checkpoint.directory import complete, drop_beyond
from pretrain.data.order import batch_number
from pretrain.distributed import fail_together, gather_objects, rank
from pretrain.rollbacks import Rollback, RollbackRule, passed_batches, read_rollbacks, write_rollbacks
from pretrain.run.step import Diverged

log = logging.getLogger("pretrain")


class RolledBack(Exception):
    """This life of the run ends; the next one begins at an earlier step."""


def roll_back(directory: Path, begun: int, rule: RollbackRule, before: tuple[Rollback, ...], why: Diverged) -> NoReturn:
    """Notes the step to which the run in `directory` goes back, and the batches that it passes over from there on.
    `begun`: the step at which the run began, before it had checkpoints of its own; `before`: its rollbacks so far.
    Every rank must call it. Always raises: RolledBack; `why` itself if the rule allows no further rollback; OSError on
    every rank if rank 0 cannot write."""
    if len(before) >= rule.most:
        if before:
            what = f"{why.what}, also after {len(before)} of {rule.most} rollbacks"
            raise Diverged(why.first, why.step, what, why.way_out) from None
        raise why
    saved: list[int] = []
    if rank() == 0:
        saved = [manifest["step"] for _, manifest in complete(directory / "checkpoints")]
    to = target(gather_objects(saved)[0], begun, why.first - 1, rule.before)
    passed = passed_batches(before)
    first = batch_number(max(why.first - rule.before, to + 1), passed)
    last = batch_number(why.step, passed) + rule.after
    entry = Rollback(why.step, to, first, last, why.what, time.time())
    fail_together(lambda: write_rollbacks(directory, (*before, entry)) if rank() == 0 else None)
    raise RolledBack(
        f"step {why.step}: {why.what}; going back to step {to} and from there past the batches {first} to {last} "
        f"(rollback {len(before) + 1} of {rule.most})"
    )


def target(saved: list[int], begun: int, good: int, before: int) -> int:
    """The step to go back to: of the newest of the `saved` checkpoints that is at least `before` steps older than the
    last `good` step; else of the oldest one up to that step; else `begun`."""
    usable = [step for step in saved if step <= good]
    old = [step for step in usable if step <= good - before]
    return max(old) if old else min(usable, default=begun)


def finish_rollback(directory: Path) -> None:
    """Completes the last rollback: removes the checkpoints behind the step to which the run goes back. May be killed at
    any moment and called again. Every rank must call it; rank 0 holds the lock."""

    def finish() -> None:
        *before, newest = read_rollbacks(directory) or (None,)
        if newest is None or newest.done:
            return
        drop_beyond(directory / "checkpoints", newest.to)
        write_rollbacks(directory, (*before, replace(newest, done=True)))
        log.info("rollback %d: from step %d to %d", len(before) + 1, newest.step, newest.to)

    fail_together(lambda: finish() if rank() == 0 else None)


def rollbacks_of(directory: Path) -> tuple[Rollback, ...]:
    """The rollbacks of the run in `directory`, the same on every rank. Every rank must call it."""
    return gather_objects(read_rollbacks(directory) if rank() == 0 else ())[0]
