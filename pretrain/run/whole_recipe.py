"""Checks, before a stage starts, the recipe's later stages, whose mistakes would otherwise show days later."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.weights import WEIGHTS
from pretrain.config import Recipe, Stage
from pretrain.run.build import check_model
from pretrain.run.image_targets import check_tokenizer, predicts_codes
from pretrain.run.inputs import text_tokenizer
from pretrain.run.stored_weights import weights_path
from pretrain.settings import nearest


def check_other_stages(recipe: Recipe, current: str, run_dir: Path, *, changed: bool) -> None:
    """Raises ValueError for a mistake in a stage that is neither `current` nor finished. Their data, and weights that
    an earlier stage will write, need not exist. `changed`: `current` has settings that differ from the recipe's file;
    then the others' image codes are not compared with it, since they may be changed to fit when their time comes."""
    for name, stage in recipe.stages.items():
        if name == current or (run_dir / name / WEIGHTS).is_file():
            continue
        try:
            _check_names(recipe, name, stage, run_dir)
            if not (changed and stage.visual_tokenizer == current):
                _check_codes(recipe, stage)
            text_tokenizer(recipe, stage)
            check_model(recipe, stage)
        except ValueError as error:
            raise ValueError(f"stage {name}, which comes later: {error}") from error


def _check_names(recipe: Recipe, name: str, stage: Stage, run_dir: Path) -> None:
    """ValueError for a knob that names no stage of the recipe and no weights. Teachers given by a path are not checked:
    they may be missing if their tokenizer was trained elsewhere."""
    teachers = {knob: value for knob, value in stage.reads.items() if not set(value) & {"/", "$"}}
    named = {"init_from": stage.init_from, "visual_tokenizer": stage.visual_tokenizer, **teachers}
    for knob, value in named.items():
        if value == name:
            raise ValueError(f"{knob}={value} is the stage itself; name one that comes before it")
        if value is None or value in recipe.stages or _made_here(value, recipe, run_dir):
            continue
        try:
            weights_path(value, run_dir, knob)
        except ValueError as error:
            near = nearest(value, list(recipe.stages))
            raise ValueError(f"{knob}={value} is no stage of the recipe{near}, and no weights are there") from error


def _made_here(value: str, recipe: Recipe, run_dir: Path) -> bool:
    """Whether `value` is the path of weights that a stage of this run directory will write."""
    path = Path(value).expanduser().resolve()
    homes = {(run_dir / name).resolve() for name in recipe.stages}
    return path in homes or (path.name == WEIGHTS and path.parent in homes)


def _check_codes(recipe: Recipe, stage: Stage) -> None:
    if predicts_codes(stage):
        if stage.visual_tokenizer is None:
            raise ValueError("visual_tokenizer is not set but the stage predicts image codes; name a tokenizer stage")
        maker = recipe.stages.get(stage.visual_tokenizer)
        if maker is not None:
            check_tokenizer(recipe.model_of(maker), stage.visual_tokenizer, recipe, stage)
