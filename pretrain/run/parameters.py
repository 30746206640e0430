"""Which parameters a stage builds, trains, and trains later, and the checks of the patterns that name them."""

from __future__ import annotations

from fnmatch import fnmatch

import torch
from torch import nn

from pretrain.config import Recipe, Stage
from pretrain.layers import PLAIN
from pretrain.models.lora import is_adapter

LEARNED = "loss_weights."  # the parameters of `task.learned`


def parameter_names(recipe: Recipe, stage: Stage) -> list[str]:
    """The parameters of the whole task, whatever part of it this rank holds; nothing is allocated."""
    with torch.device("meta"):
        task = stage.task.build(recipe.model_of(stage), stage, PLAIN, None)
    return [name for name, _ in task.named_parameters()]


def frozen_names(recipe: Recipe, stage: Stage) -> set[str]:
    """The parameters that the stage builds but does not train."""
    return {name for name in parameter_names(recipe, stage) if not stage.trains(name)}


def waiting(task: nn.Module, stage: Stage) -> dict[str, int]:
    """{trainable parameter that stage.unfreeze holds back: the first step that trains it}."""
    firsts = {name: stage.first_step(name) for name, value in task.named_parameters() if value.requires_grad}
    return {name: first for name, first in firsts.items() if first > 1}


def freeze(task: nn.Module, stage: Stage) -> nn.Module:
    """Sets `requires_grad` of every parameter to whether the stage trains it, in place."""
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(stage.trains(name))
    return task


def check_patterns(recipe: Recipe, stage: Stage) -> None:
    """Raises ValueError for a pattern that matches no parameter, for adapters none of which is trained, for learned
    weights of losses that are not trained, and for an `unfreeze` that leaves nothing to train in the first step."""
    names = parameter_names(recipe, stage)
    trained = [name for name in names if stage.trains(name)]
    asked = {"trainable": (stage.trainable, names), "unfreeze": (stage.unfreeze, trained)}
    asked["optim.factors"] = (stage.optim.factors, trained)
    for knob, (patterns, known) in asked.items():
        kind = "parameter" if known is names else "trainable parameter"
        for pattern in patterns:
            if not any(fnmatch(name, pattern) for name in known):
                raise ValueError(
                    f"{knob}={pattern!r} matches no {kind} of the stage; names look like {(known or names)[-1]!r}"
                )
    if stage.lora is not None and not any(is_adapter(name) for name in trained):
        raise ValueError(f"trainable={stage.trainable} leaves no adapter of lora to train; add '*.lora_*'")
    learned = [name for name in names if name.startswith(LEARNED)]
    if not set(learned) <= set(trained):
        raise ValueError(f"trainable={stage.trainable} keeps task.learned from learning; add '{LEARNED}*'")
    if stage.unfreeze and not any(stage.first_step(name) == 1 for name in trained):
        raise ValueError(f"unfreeze={stage.unfreeze} leaves nothing to train in step 1; let a part begin there")
