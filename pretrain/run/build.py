"""From a recipe's stage to the objects that run it: the task, its loader, the visual tokenizer, the files it reads."""

from __future__ import annotations

import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain.batch import Layout
from pretrain.checkpoint.save import Found
from pretrain.checkpoint.weights import load_handover
from pretrain.config import Recipe, Stage, stage_hash, to_json
from pretrain.data.loader import Loader
from pretrain.data.masking import Masking
from pretrain.data.shards.manifest import fill_variables
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.distributed import world_size
from pretrain.layers import PLAIN, Layers
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.parallel.ds_config import load_ds_config
from pretrain.parallel.legal import ModelSizes, check_legal
from pretrain.parallel.mesh import Mesh, Place
from pretrain.parallel.state import dense_shape, fill, named_state
from pretrain.run.image_targets import masking_of, teacher_of, weights_path
from pretrain.tasks.pipeline import PipelineTask, pipeline_bounds
from pretrain.tasks.pretrain import PretrainTask
from pretrain.tasks.tokenizer import TokenizerTask

log = logging.getLogger(__name__)


def check_task(recipe: Recipe, stage: Stage) -> None:
    """Raises ValueError for what a user can get wrong about the model, without building it."""
    if stage.tokenizer is not None:
        if stage.transform.size != stage.tokenizer.image_size:
            raise ValueError(
                f"transform.size={stage.transform.size} but tokenizer.image_size={stage.tokenizer.image_size}; "
                "use one size"
            )
        return
    if any(kind != "texts" for kind in stage.mix) and stage.transform.size != recipe.model.image_size:
        raise ValueError(
            f"transform.size={stage.transform.size} but model.image_size={recipe.model.image_size}; use one size"
        )
    names = parameter_names(recipe, stage)
    for pattern in stage.trainable:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"trainable={pattern!r} matches no parameter of the stage; names look like {names[-1]!r}")


def parameter_names(recipe: Recipe, stage: Stage) -> list[str]:
    """Of the whole task, whatever part of it a rank holds; nothing is allocated."""
    with torch.device("meta"):
        return [name for name, _ in _pretrain_task(recipe, stage, PLAIN).named_parameters()]


def frozen_names(recipe: Recipe, stage: Stage) -> set[str]:
    """The parameters that the stage leaves as they are; a tokenizer stage trains all of its own."""
    names = parameter_names(recipe, stage) if stage.tokenizer is None else []
    return {name for name in names if not any(fnmatch(name, pattern) for pattern in stage.trainable)}


def build_task(
    recipe: Recipe,
    stage: Stage,
    run_dir: Path,
    layers: Layers = PLAIN,
    born: AbstractContextManager[None] | None = None,
) -> PretrainTask | TokenizerTask:
    """The stage's task with fresh weights, on the CPU; only what the stage trains or needs is built, inside the context
    `born` (engine.partitioned_init, which splits each parameter at once)."""
    torch.manual_seed(recipe.seed)
    check_task(recipe, stage)
    if stage.tokenizer is not None:
        teacher = teacher_of(stage, run_dir)
        if teacher.dim != stage.tokenizer.target_dim or teacher.distill != stage.tokenizer.distill:
            raise ValueError(
                f"teacher={stage.teacher} gives {teacher.dim} numbers a patch, to be learned by {teacher.distill}, but "
                f"tokenizer.target_dim={stage.tokenizer.target_dim} and tokenizer.distill={stage.tokenizer.distill}; "
                "set them to the teacher's"
            )
        with born or nullcontext():
            return TokenizerTask(stage.tokenizer, teacher)
    with born or nullcontext():
        task = _pretrain_task(recipe, stage, layers)
    return _freeze(task, stage)


def build_part(recipe: Recipe, stage: Stage, mesh: Mesh, layers: Layers, layout: Layout) -> PretrainTask:
    """The part of the stage's task that this rank's pipeline stage holds; every micro-batch has `layout`."""
    torch.manual_seed(recipe.seed)
    model, place = _model(recipe, stage), mesh.pipe.rank
    bounds = pipeline_bounds(model, stage.objectives, layout, mesh.pipe.size)
    part = PipelineTask(model, stage.experts, stage.objectives, layers, layout=layout, bounds=bounds, stage=place)
    return _freeze(part, stage)


def _pretrain_task(recipe: Recipe, stage: Stage, layers: Layers) -> PretrainTask:
    return PretrainTask(_model(recipe, stage), stage.experts, stage.objectives, layers)


def _model(recipe: Recipe, stage: Stage) -> MultiwayConfig:
    return replace(recipe.model, drop_path=stage.drop_path, activation_checkpointing=stage.activation_checkpointing)


def _freeze(task: PretrainTask, stage: Stage) -> PretrainTask:
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in stage.trainable))
    return task


def stage_ds_config(path: str, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The DeepSpeed JSON with what the stage and the number of ranks derive. Raises ValueError with every reason why
    recipe, JSON and ranks do not go together."""
    model = recipe.model
    sizes = ModelSizes(
        model.dim,
        model.depth,
        model.heads,
        model.ffn_dim,
        model.vocab_size if "language" in stage.experts else 0,
        model.image_codes if masking_of(stage) is not None and "vision" in stage.experts else 0,
    )
    accumulation = stage.batch.accumulation
    # The ranks over which DeepSpeed splits a step: sequence ranks count as data ranks to it.
    copies = max(world_size() // (stage.parallel.tensor * stage.parallel.pipe), 1)
    config = load_ds_config(
        path,
        micro=max(stage.batch.total // (copies * accumulation), 1),
        accumulation=accumulation,
        world=copies,
        clip=stage.optim.clip,
    )
    check_legal(
        stage.parallel,
        world=world_size(),
        config=config,
        counts=stage.batch.counts(),
        accumulation=accumulation,
        model=None if stage.tokenizer else sizes,
        objectives=[objective.name for objective in stage.objectives],
        compiled=stage.compile,
        node=int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None,  # of torchrun and deepspeed
    )
    return config


def build_loader(recipe: Recipe, stage: Stage, stage_dir: Path | None, place: Place) -> Loader:
    """The stage's training batches for the rank at `place`. The first of the ranks that see the same batch writes the
    traces into `stage_dir`."""
    if place.tensor or place.sequence or place.pipe:
        stage_dir = None
    return Loader(
        stage.mix,
        counts=stage.batch.counts(),
        accumulation=stage.batch.accumulation,
        rank=place.data,
        world=place.data_size,
        seed=recipe.seed,
        tokenizer=text_tokenizer(recipe, stage),
        transform=stage.transform,
        masking=masking_of(stage),
        patch_size=_patch_size(recipe, stage),
        loading=recipe.loading,
        noise=2 * recipe.model.depth if stage.drop_path else 0,
        trace=stage_dir if recipe.trace_samples else None,
        quarantine=stage_dir / "quarantine.jsonl" if stage_dir else None,
    )


def evaluation_loader(
    recipe: Recipe, stage: Stage, mix: dict, counts: dict[str, int], masking: Masking | None
) -> Loader:
    """Held-out batches: centre crops, one rank, the order and masks of a fixed seed."""
    return Loader(
        mix,
        counts=counts,
        accumulation=1,
        rank=0,
        world=1,
        seed=recipe.seed,
        tokenizer=text_tokenizer(recipe, stage),
        transform=replace(stage.transform, train=False),
        masking=masking,
        patch_size=_patch_size(recipe, stage),
        loading=recipe.loading,
    )


def text_tokenizer(recipe: Recipe, stage: Stage) -> TextTokenizer | None:
    if not any(kind != "images" for kind in stage.mix):
        return None
    if recipe.text_tokenizer is None:
        raise ValueError("text_tokenizer is not set but the stage reads texts; give the path of a SentencePiece model")
    path = Path(fill_variables(recipe.text_tokenizer, "text_tokenizer")).expanduser()
    if not path.is_file():
        raise ValueError(
            f"text_tokenizer={path} does not exist; train one: python -m data_tools.train_text_tokenizer --help"
        )
    tokenizer = TextTokenizer(path)
    if tokenizer.vocab_size > recipe.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={recipe.model.vocab_size} is smaller than the {tokenizer.vocab_size} ids of {path}; "
            f"use model.vocab_size={-(-tokenizer.vocab_size // 64) * 64}"
        )
    return tokenizer


class Start(NamedTuple):
    """Where a run's weights came from."""

    weights: Path | None  # the file that filled the task: a checkpoint's, or that of init_from
    init: Path | None  # init_from's file, for what it holds besides


def load_start(task: torch.nn.Module, stage: Stage, run_dir: Path, found: Found | None, mesh: Mesh) -> Start:
    """Fill the task from the checkpoint `found`, else from `stage.init_from`; each choice is one log line."""
    init = weights_path(stage.init_from, run_dir, "init_from") if stage.init_from is not None else None
    path = found.weights if found is not None else init
    if path is None:
        log.info("weights: from scratch")
        return Start(None, None)
    held = load_handover(
        named_state(task), path, shape_of=partial(dense_shape, mesh=mesh), fill=partial(fill, mesh=mesh)
    )
    log.info("weights: %d tensors from %s", len(held.loaded), path)
    if held.missing:
        log.info("weights from scratch (not in that file): %s", _shorten(held.missing))
    if held.unexpected and mesh.pipe.size == 1:
        log.info("weights passed on untouched (this stage does not build them): %s", _shorten(held.unexpected))
    return Start(path, init)


def weights_config(recipe: Recipe, stage: Stage, name: str) -> dict:
    """What config.json beside weights.safetensors says: enough to build the model again without the recipe."""
    part = {"tokenizer": to_json(stage.tokenizer)} if stage.tokenizer else {"model": to_json(recipe.model)}
    return {"recipe": recipe.name, "stage": name, "recipe_hash": stage_hash(recipe, stage), **part}


def _patch_size(recipe: Recipe, stage: Stage) -> int:
    return stage.tokenizer.patch_size if stage.tokenizer else recipe.model.patch_size


def _shorten(names: list[str]) -> str:
    """Parameter names by their first three parts, so that a log line stays a line."""
    groups = sorted({".".join(name.split(".")[:3]) for name in names})
    more = f" and {len(groups) - 6} more" if len(groups) > 6 else ""
    return ", ".join(groups[:6]) + more
