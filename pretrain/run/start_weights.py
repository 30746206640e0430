"""Loads the weights with which a stage begins or goes on."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from pretrain.checkpoint.save import Checkpoint, average_of
from pretrain.checkpoint.weights import load_handover, weights_header
from pretrain.config import Recipe, Stage
from pretrain.contracts import State
from pretrain.parallel.mesh import Mesh
from pretrain.parallel.state import dense_shape, fill, named_state
from pretrain.run.stored_weights import classes_of, model_in, weights_path

log = logging.getLogger("pretrain")


def load_start(
    task: nn.Module, recipe: Recipe, stage: Stage, run_dir: Path, checkpoint: Checkpoint | None, mesh: Mesh
) -> Path | None:
    """Fills the task from the checkpoint, else from `stage.init_from`, and logs the choice. Returns the file that
    init_from names, whose other tensors the stage will pass on."""
    init = weights_path(stage.init_from, run_dir, "init_from") if stage.init_from is not None else None
    path = checkpoint.weights if checkpoint is not None else init
    if path is None:
        log.info("weights: from scratch")
        return None
    own = named_state(task)
    renewed = [f"objectives.{each.name}.{name}" for each in stage.objectives for name in getattr(each, "renewed", ())]

    def adapt(state: State, config: dict[str, Any], wanted: dict[str, tuple[int, ...]]) -> State:
        adapted = recipe.model_of(stage).adapt(state, model_in(config, path, classes_of(recipe)), wanted)
        return adapted | {name: own[name].clone() for name in renewed if name in wanted}

    shape_of, fill_part = partial(dense_shape, mesh=mesh), partial(fill, mesh=mesh)
    # A checkpoint of this stage goes on with its own weights; from another stage's begins what that hands over.
    average = average_of(path) if checkpoint is None else None
    handover = load_handover(own, path, shape_of=shape_of, fill=fill_part, adapt=adapt, average=average)
    if not handover.loaded:
        _refuse_another_kind(recipe, stage, path)
    log.info("weights: %d tensors from %s", len(handover.loaded), path)
    if handover.adapted:
        log.info("weights made to fit this stage's model: %s", _shorten(handover.adapted))
    if handover.missing:
        log.info("weights from scratch (not in that file): %s", _shorten(handover.missing))
    if handover.unexpected and mesh.pipe.size == 1:
        log.info("weights passed on untouched (this stage does not build them): %s", _shorten(handover.unexpected))
    return init


def _refuse_another_kind(recipe: Recipe, stage: Stage, path: Path) -> None:
    """ValueError for weights of another class of model, of which no tensor fits. For weights of the same class that is
    no mistake: with attention per modality, vision and language share no names, and the stage passes the others on."""
    own, stored = recipe.model_of(stage), model_in(weights_header(path).get("config", {}), path, classes_of(recipe))
    if type(stored) is not type(own):
        raise ValueError(
            f"init_from={stage.init_from}: none of its tensors belongs to this stage, since it holds a "
            f"{type(stored).__name__} and the stage trains a {type(own).__name__}; name the weights of one"
        )


def _shorten(names: list[str]) -> str:
    """Parameter names by their first three parts, so that a log line stays a line."""
    groups = sorted({".".join(name.split(".")[:3]) for name in names})
    more = f" and {len(groups) - 6} more" if len(groups) > 6 else ""
    return ", ".join(groups[:6]) + more
