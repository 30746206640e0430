"""A run that goes on where another one stopped: for more steps, or with other rates (pretrain.train --continue-from).

It is a run of its own, in a directory of its own, and its identity names its parent. It begins with everything that a
checkpoint of the parent holds, so that the order of the data and the count of steps go on, and it takes over the
parent's metrics up to that step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.checkpoint.directory import complete
from pretrain.checkpoint.save import Checkpoint
from pretrain.config import Recipe, Stage
from pretrain.files import write_file
from pretrain.metrics import EVALS, FILE
from pretrain.rollbacks import ROLLBACKS, read_rollbacks, write_rollbacks
from pretrain.run.directory import noted_identity, read_recipe, run_identity
from pretrain.run.identity import CONTINUES, as_begun, differences, hash_of, identity_of

log = logging.getLogger("pretrain")

MAY_CHANGE = ("steps", "optim")
CHECKPOINTS = "checkpoints"
GENERATIONS = 1000  # of runs that continue one another; more would mean a circle


def start_identity(directory: Path, recipe: Recipe, stage: Stage, parent: Path | None) -> dict[str, Any]:
    """The identity of the run in `directory`. `parent`: the stage's directory, or a checkpoint, that it continues, or
    None. Raises ValueError as run_identity does, where parent and run do not go together, and where either one's list
    of rollbacks is damaged."""
    read_rollbacks(directory)
    if parent is None:
        return run_identity(directory, recipe, stage)
    chosen = parent.resolve()
    place = chosen.parent.parent if chosen.parent.name == CHECKPOINTS else chosen
    if (noted := noted_identity(directory)) is not None:
        if _continues(noted).get("from") != str(place):
            raise ValueError(f"--continue-from {parent}: {directory} holds another run; take another --run-dir")
        return run_identity(directory, recipe, stage)  # it goes on from its own checkpoints
    if place == directory.resolve():
        raise ValueError(f"--continue-from {parent} is this run itself; take another --run-dir")
    before = read_recipe(place).get("identity")
    if not isinstance(before, dict):
        raise ValueError(f"--continue-from {parent} is no stage's directory of a run, such as runs/base/vision")
    _check_changes(parent, before, recipe, stage)
    read_rollbacks(place)
    step = _last_step(parent, place / CHECKPOINTS, chosen.name if place != chosen else None)
    if stage.steps <= step:
        raise ValueError(
            f"steps={stage.steps}: the run in {place} has done {step} already; set steps= to more than that"
        )
    identity = identity_of(recipe, as_begun(stage, before))
    if as_begun(stage, before) is not stage:
        del identity["transform"]["antialias"]  # as in the parent's, so that later starts know how it began
    return identity | {CONTINUES: {"from": str(place), "run": hash_of(before), "step": step}}


def inputs_dir(run_dir: Path, identity: Any) -> Path:
    """The run directory whose stages the settings name: that of the first run, which continues no other."""
    for _ in range(GENERATIONS):
        parent = _continues(identity).get("from")
        if not isinstance(parent, str):
            break
        run_dir, identity = Path(parent).parent, read_recipe(Path(parent)).get("identity")
    return run_dir


def parent_checkpoint(identity: dict[str, Any], find: Callable[..., Checkpoint | None]) -> Checkpoint | None:
    """The parent's checkpoint with which the run begins; None for a run without a parent. `find`:
    checkpoint.save.newest with this run's precision and data. Every rank must call it. Raises ValueError if the
    checkpoint is missing or damaged, or if data or precision differ from the parent's."""
    if not (parent := _continues(identity)):
        return None
    directory, step = Path(parent["from"]) / CHECKPOINTS, parent["step"]
    checkpoint = find(directory, recipe_hash=parent["run"], step=step, own=False)
    if checkpoint is None:
        raise ValueError(
            f"--continue-from: the checkpoint of step {step} in {directory} is damaged or missing; give another, such "
            f"as --continue-from {directory / 'step_00001000'}"
        )
    return checkpoint


def take_over_rollbacks(identity: dict[str, Any], directory: Path) -> None:
    """Copies the parent's list of rollbacks (the batches that it passes over) into the directory of a run that has no
    checkpoint of its own. It must come before this start reads the list, on which the order of its data depends. Called
    on one rank."""
    parent = _continues(identity).get("from")
    begun = (directory / ROLLBACKS).exists() or any((directory / CHECKPOINTS).glob("step_*"))
    if parent is None or begun:  # a run that has gone back itself has them in its own list
        return
    if done := tuple(rollback for rollback in read_rollbacks(Path(parent)) if rollback.done):
        write_rollbacks(directory, done)


def take_over(identity: dict[str, Any], directory: Path) -> None:
    """Copies the parent's metrics.jsonl and evals.jsonl into the directory of a run that begins; MetricsLog and
    Progress drop the lines behind its start. Called on one rank."""
    parent = Path(_continues(identity)["from"])
    with suppress(FileNotFoundError):  # not every run evaluates itself
        write_file(directory / EVALS, (parent / EVALS).read_bytes())
    try:
        write_file(directory / FILE, (parent / FILE).read_bytes())
    except FileNotFoundError:
        log.warning("%s does not exist: the curves begin with this run", parent / FILE)


def parents(directory: Path) -> Iterator[Path]:
    """The directories of the runs that the one in `directory` continues: its parent's, its parent's parent's, ..."""
    for _ in range(GENERATIONS):
        before = _continues(read_recipe(directory).get("identity")).get("from")
        if not isinstance(before, str):
            break
        directory = Path(before)
        yield directory


def begins_at(identity: Any) -> int:
    """The step at which a run of this identity begins: the parent's, or 0."""
    step = _continues(identity).get("step")
    return step if isinstance(step, int) else 0


def _continues(identity: Any) -> dict[str, Any]:
    """The part of an identity that names the parent: {from, run, step}; {} without one."""
    parent = identity.get(CONTINUES) if isinstance(identity, dict) else None
    return parent if isinstance(parent, dict) else {}


def _check_changes(parent: Path, before: dict[str, Any], recipe: Recipe, stage: Stage) -> None:
    changed = differences(before, recipe, stage)
    wrong = {key: values for key, values in changed.items() if key.split(".")[0] not in MAY_CHANGE}
    if wrong:
        named = ", ".join(f"{key}={then} (now {now})" for key, (then, now) in list(wrong.items())[:4])
        raise ValueError(
            f"--continue-from {parent}: only {' and '.join(MAY_CHANGE)} may change, and {named} would; undo that, or "
            "begin a new run with init_from="
        )


def _last_step(parent: Path, checkpoints: Path, name: str | None) -> int:
    for found, manifest in complete(checkpoints):
        if name in (None, found):
            return manifest["step"]
    raise ValueError(
        f"--continue-from {parent}: {checkpoints} holds no complete checkpoint{f' {name}' if name else ''}; of its "
        "weights alone a new run begins, with init_from="
    )
