"""A stage's trained model as its evaluations see it, and their numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.config import Recipe, Stage
from pretrain.data.shards.reader import load_manifest
from pretrain.distributed import device
from pretrain.evals.trained import Trained
from pretrain.models.visual_tokenizer.teachers import PixelTeacher
from pretrain.run.image_targets import image_targets, load_visual_tokenizer
from pretrain.run.inputs import evaluation_loader, text_tokenizer

log = logging.getLogger("pretrain")


def evaluate(stage: Stage, trained: Trained) -> tuple[dict[str, float], dict[str, list]]:
    """Runs the stage's evaluations -> (numbers for eval.json, samples for samples.json). Where a later evaluation's
    numbers have names that are taken, such as retrieval on a second set, they become retrieval#2/...; samples of each
    class of evaluation come from the first one."""
    metrics: dict[str, float] = {}
    samples: dict[str, list] = {}
    kinds = set[type]()
    for evaluation in stage.evals:
        again = type(evaluation) in kinds
        with TemporaryDirectory() if again else nullcontext(trained.directory) as directory:
            values, shown = evaluation.run(replace(trained, directory=Path(directory)))
        kinds.add(type(evaluation))
        metrics |= _beside(metrics, values)
        samples |= {} if again else shown
    return metrics, samples


def _beside(taken: dict[str, float], values: dict[str, float]) -> dict[str, float]:
    """`values` under names that are not `taken`: where one is, all get the same number."""
    number, named = 1, values
    while named.keys() & taken.keys():
        number += 1
        parts = {name: name.partition("/") for name in values}
        named = {f"{first}#{number}{slash}{rest}": values[name] for name, (first, slash, rest) in parts.items()}
    return named


def said(stage: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among the values of `evaluate`; for each that is missing the log says why."""
    for name, value in values.items():
        if value is None:
            log.warning("%s: %s is missing: %s", stage, name, values.get(f"{name}/missing"))
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


def trained_stage(
    recipe: Recipe,
    stage: Stage,
    run_dir: Path,
    directory: Path,
    task: nn.Module,
    add_targets: Callable[[Batch], Batch] | None = None,
) -> Trained:
    """The task with everything that evaluations need. `add_targets`: the result of image_targets, if it exists
    already."""
    return Trained(
        task=task,
        device=device(),
        directory=directory,
        loader=lambda mix, counts, masking: evaluation_loader(recipe, stage, mix, counts, masking),
        with_codes=add_targets or image_targets(recipe, stage, run_dir, device()),
        draw_codes=_painter(recipe, stage, run_dir, task),
        samples_of=lambda source: sum(load_manifest(source.shards).counts),
        masking=stage.masking,
        text=text_tokenizer(recipe, stage),
    )


def _painter(recipe: Recipe, stage: Stage, run_dir: Path, task: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A function from codes to pictures if the visual tokenizer learned pixels; None if it learned features."""
    tokenizer: Any
    if hasattr(task, "tokenizer"):
        tokenizer = task.tokenizer
    elif stage.visual_tokenizer is not None:
        tokenizer = load_visual_tokenizer(recipe, stage, run_dir).to(device())
    else:
        return None
    if tokenizer.cfg.distill != "mse":
        return None
    teacher = PixelTeacher(tokenizer.cfg.patch_size)

    @torch.no_grad()
    def draw(codes: Tensor) -> Tensor:
        picture = teacher.picture(tokenizer.decode_codes(codes))
        return nn.functional.interpolate(picture.float(), size=tokenizer.cfg.image_size, mode="nearest").byte()

    return draw
