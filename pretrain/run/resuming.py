"""From where a start of a run goes on: the checkpoint, the rollbacks, the copies on the nodes."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.checkpoint.copies import Copies, open_copies
from pretrain.checkpoint.save import Checkpoint, newest
from pretrain.distributed import fail_together, rank
from pretrain.rollbacks import Rollback
from pretrain.run.continuation import parent_checkpoint, take_over, take_over_rollbacks
from pretrain.run.rollback import finish_rollback, rollbacks_of


class Start(NamedTuple):
    """From where a start goes on."""

    checkpoint: Checkpoint | None = None  # None: the run begins at step 0
    rollbacks: tuple[Rollback, ...] = ()
    copies: Copies | None = None  # None: the run makes no copies of checkpoints on its nodes


def find_start(
    directory: Path,
    settings: dict[str, Any],
    precision: str,
    *,
    copied: bool,
    recipe_hash: str,
    data_digest: str,
    names_digest: str,
) -> Start:
    """Where the run in `directory`, whose lock rank 0 holds, goes on: from its own newest checkpoint, which, if the run
    is `copied`, may be a copy on its nodes; else from its parent's, whose metrics up to there are taken over. Every
    rank must call it. Raises ValueError as `newest` and `open_copies` do."""
    fail_together(lambda: take_over_rollbacks(settings, directory) if rank() == 0 else None)
    finish_rollback(directory)
    rollbacks = rollbacks_of(directory)
    copies = open_copies(directory, len(rollbacks)) if copied else None
    find = partial(newest, precision=precision, data_digest=data_digest, names_digest=names_digest)
    shared = directory / "checkpoints"
    checkpoint = find(shared, recipe_hash=recipe_hash)
    step = -1 if checkpoint is None else checkpoint.step
    if copies is not None and copies.bring_back(shared, newer_than=step):
        checkpoint = find(shared, recipe_hash=recipe_hash)
    if checkpoint is None and (checkpoint := parent_checkpoint(settings, find)) is not None:
        fail_together(lambda: take_over(settings, directory) if rank() == 0 else None)
    return Start(checkpoint, rollbacks, copies)
