"""From a recipe's stage to the objects that run it, by `build_run`, which pretrain.train and the benchmarks call."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.batch import Batch, Layout
from pretrain.checkpoint.copies import Copies
from pretrain.checkpoint.save import resume
from pretrain.checkpoint.weights import LORA
from pretrain.config import Recipe, Stage, to_json
from pretrain.data.loader import Loader
from pretrain.distributed import device, rank, world_size
from pretrain.flops import StepFlops
from pretrain.layers import PLAIN, Layers
from pretrain.lock import Lock
from pretrain.optim import build_optimizer, described, schedule
from pretrain.parallel.average import average_in_place, begin_average, follow
from pretrain.parallel.ds_config import deepcompiles, load_ds_config, precision_name, zero_stage
from pretrain.parallel.engine import build_engine, check_deepcompile, init_distributed, partitioned_init
from pretrain.parallel.faults import Watch
from pretrain.parallel.legal import check_legal
from pretrain.parallel.mesh import Mesh, create_mesh, mpu_of, place_of
from pretrain.parallel.pipeline import build_pipeline_engine, pipeline_step
from pretrain.parallel.state import full_state
from pretrain.parallel.tensor import parallel_layers
from pretrain.parallel.unfreezing import Unfreezing
from pretrain.rollbacks import Rollback, passed_batches
from pretrain.run.continuation import begins_at
from pretrain.run.directory import inputs_digest, other_inputs, take_directory
from pretrain.run.identity import hash_of
from pretrain.run.image_targets import image_targets
from pretrain.run.inputs import build_loader, text_tokenizer
from pretrain.run.labels import check_labels
from pretrain.run.numerics import set_numerics
from pretrain.run.parameters import check_patterns, freeze, frozen_names, parameter_names, waiting
from pretrain.run.resuming import Start, find_start
from pretrain.run.start_weights import load_start
from pretrain.run.step import train_step
from pretrain.run.stored_weights import read_model
from pretrain.tasks.pipeline import PipelineTask, pipeline_bounds
from pretrain.tasks.pretrain import layer_of

log = logging.getLogger("pretrain")


@dataclass(frozen=True)
class Run:
    """A stage, ready for its next step."""

    recipe: Recipe
    stage: Stage
    engine: Any
    mesh: Mesh
    loader: Loader
    add_targets: Callable[[Batch], Batch]
    ds_config: dict[str, Any]
    identity: dict[str, str]  # hashes of its settings and its inputs, for checkpoints
    done: int  # steps that the checkpoint holds from which it goes on
    init_file: Path | None  # the weights that init_from names
    lock: Lock | None = None  # rank 0's, on the directory
    begun: int = 0  # the step at which it began, before it had a checkpoint of its own
    rollbacks: tuple[Rollback, ...] = ()
    unfreezing: Unfreezing | None = None
    norms: deque[float] = field(default_factory=deque)  # of the last steps' gradients, for run/step.Judge
    copies: Copies | None = None  # of checkpoints, on the nodes' own disks

    def step(self, micro_batches: list[Batch], *, first: bool = False) -> dict[str, Tensor]:
        """One optimizer step -> the means over its micro-batches of the task's report. `first`: it is a run's first."""
        if self.unfreezing is not None:
            self.unfreezing.begin_step()
        if self.mesh.pipe.size > 1:
            report = pipeline_step(self.engine, micro_batches, self.add_targets)
        else:
            report = train_step(self.engine, micro_batches, self.add_targets, first=first)
        if self.stage.ema is not None:
            follow(self.engine, self.stage.ema.share(self.engine.global_steps))
        return report

    def whole_state(self, *, last: bool = False) -> dict[str, Tensor]:
        """The stage's weights, whole on rank 0: their average if the stage keeps one, unless `last` asks for the last
        step's. A collective of every rank."""
        averaged = self.stage.ema is not None and not last
        with average_in_place(self.engine) if averaged else nullcontext():
            return full_state(self.engine, self.mesh)

    def flops(self, micro_batches: list[Batch]) -> StepFlops:
        """The FLOPs of one step on this rank's `micro_batches`; zero on a pipe stage that has none."""
        stage, model = self.stage, self.recipe.model_of(self.stage)
        real = [batch.real_layout for batch in micro_batches]
        whole = sum(stage.task.flops(model, stage, batch.layout) for batch in micro_batches)
        own = sum(stage.task.flops(model, stage, layout) for layout in real)
        executed = sum(stage.task.executed_flops(model, stage, layout, self._trained) for layout in real)
        return StepFlops(*(each / stage.parallel.model for each in (whole, own, executed)))

    @cached_property
    def _trained(self) -> frozenset[str]:
        return frozenset(parameter_names(self.recipe, self.stage)) - frozen_names(self.recipe, self.stage)

    @property
    def rows(self) -> int:
        """The rows of one step, with padding, on this rank's data."""
        return self.loader.layout.rows * self.stage.batch.accumulation

    def weights_config(self, name: str) -> dict[str, Any]:
        """The content of config.json beside weights.safetensors: enough to build the model again without the recipe,
        and to prepare pictures as its evaluations do. `name`: the stage's."""
        model, evaluation = to_json(self.recipe.model_of(self.stage)), getattr(self.stage.transform, "evaluation", None)
        config = {"recipe": self.recipe.name, "stage": name, "recipe_hash": self.identity["recipe_hash"]}
        lora = {} if self.stage.lora is None else {LORA: to_json(self.stage.lora)}
        return config | {"model": model} | ({"look": {"evaluation": evaluation}} if evaluation else {}) | lora


def build_run(
    recipe: Recipe,
    stage: Stage,
    ds: str,
    run_dir: Path,
    watch: Watch,
    *,
    directory: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> Run:
    """Everything that a stage needs for its steps, on this rank; goes on from the newest checkpoint in `directory`.
    `settings` is the identity of the run there (continuation.start_identity); `run_dir` holds the stages that it names.
    Without a directory nothing is written and nothing resumed. Raises ValueError for a user's mistake, wherever
    possible before the ranks communicate.
    """
    set_numerics(recipe)
    place = place_of(stage.parallel, rank(), world_size())
    ds_config = stage_ds_config(ds, recipe, stage)
    check_deepcompile(ds_config)
    loader = build_loader(recipe, stage, directory, place)
    check_model(recipe, stage)
    check_labels(stage)
    identity = {
        "recipe_hash": hash_of(settings or {}),
        "data_digest": inputs_digest(loader.digests, others := other_inputs(recipe, stage, run_dir)),
    }
    add_targets = image_targets(recipe, stage, run_dir, device())
    # From here on the ranks communicate: every mistake that one rank can see by itself has been reported.
    watch.start(recipe.timeout_s)
    init_distributed(watch.outlast_s)
    watch.join()
    mesh = create_mesh(stage.parallel, watch.outlast_s)
    lock, begin = None, Start()
    if directory is not None:
        lock = take_directory(directory)
        own: dict[str, Any] = identity | {"names_digest": inputs_digest(loader.names_digests, others)}
        begin = find_start(directory, settings or {}, precision_name(ds_config), copied=recipe.copy_every > 0, **own)
        loader.pass_over(passed_batches(begin.rollbacks))
    checkpoint = begin.checkpoint
    layers = parallel_layers(mesh)
    task: nn.Module
    if mesh.pipe.size > 1:
        task = build_part(recipe, stage, mesh, layers, loader.layout)
    else:
        task = build_task(recipe, stage, run_dir, layers, partitioned_init(ds_config, mpu_of(mesh)))
    init_file = load_start(task, recipe, stage, run_dir, checkpoint, mesh)
    engine = _engine(task, recipe, stage, mesh, ds_config)
    if checkpoint is not None:
        resume(engine, checkpoint, mesh)
    watch.outlast_all()
    done, saved = (0, dict[str, Any]()) if checkpoint is None else (checkpoint.step, checkpoint.extra)
    norms = deque[float](saved.get("norms", ()), maxlen=recipe.rollback.window)
    return Run(
        *(recipe, stage, engine, mesh, loader, add_targets, ds_config, identity, done, init_file, lock),
        begun=begins_at(settings),
        rollbacks=begin.rollbacks,
        unfreezing=Unfreezing(engine, waiting(engine.module, stage)) if stage.unfreeze else None,
        norms=norms,
        copies=begin.copies,
    )


def check_model(recipe: Recipe, stage: Stage) -> None:
    """Raises ValueError for a user's mistake about the model, without allocating it."""
    model = recipe.model_of(stage)
    if any(kind != "texts" for kind in stage.mix) and stage.transform.size != model.image_size:
        raise ValueError(f"transform.size={stage.transform.size} but model.image_size={model.image_size}; use one size")
    check_patterns(recipe, stage)


def build_task(
    recipe: Recipe,
    stage: Stage,
    run_dir: Path,
    layers: Layers = PLAIN,
    context: AbstractContextManager[None] | None = None,
    *,
    trains: bool = True,
) -> nn.Module:
    """The stage's task with fresh weights, on the CPU; only what the stage trains or needs is built, inside `context`
    (engine.partitioned_init, which splits each parameter as soon as it is made). `trains` False: the task will only be
    evaluated, so that no teacher's weights are read, unless the task's evaluations compute its loss."""
    check_model(recipe, stage)
    torch.manual_seed(recipe.seed)
    learns = trains or stage.task.evaluates_loss
    read = partial(read_model, run_dir=run_dir, recipe=recipe) if learns else None
    with context or nullcontext():
        task = stage.task.build(recipe.model_of(stage), stage, layers, read)
    for objective in stage.objectives if trains else ():
        objective.prepare(task.objectives[objective.name], stage, partial(text_tokenizer, recipe, stage))
    return freeze(task, stage)


def build_part(recipe: Recipe, stage: Stage, mesh: Mesh, layers: Layers, layout: Layout) -> PipelineTask:
    """The part of the stage's task that this rank's pipe stage holds; every micro-batch has `layout`."""
    torch.manual_seed(recipe.seed)
    model: Any = recipe.model_of(stage)
    checkpointing = int(stage.activation_checkpointing)
    bounds = pipeline_bounds(model, stage.objectives, layout, mesh.pipe.size, checkpointing=checkpointing)
    part = PipelineTask(
        model,
        stage.experts,
        stage.objectives,
        layers,
        layout=layout,
        bounds=bounds,
        stage=mesh.pipe.rank,
        drop_path=stage.drop_path,
        checkpointing=checkpointing,
    )
    freeze(part, stage)
    return part


def compiles(task: Any, stage: Stage, ds_config: dict[str, Any]) -> bool:
    """Whether blocks are to be compiled: what stage.compile says, or, where it is None, whether there is a GPU and the
    task has blocks that neither ZeRO-3 nor tensor or sequence ranks split and that DeepCompile does not compile."""
    if stage.compile is not None:
        return stage.compile
    whole = zero_stage(ds_config) < 3 and stage.parallel.tensor == stage.parallel.sequence == 1
    whole = whole and not deepcompiles(ds_config)
    return torch.cuda.is_available() and whole and hasattr(getattr(task, "encoder", None), "compile_blocks")


def compile_blocks(task: Any, model: Any) -> None:
    """Compiles the encoder's blocks, in place. ValueError for a `model` without blocks."""
    compile_ = getattr(getattr(task, "encoder", None), "compile_blocks", None)
    if compile_ is None:
        raise ValueError(f"compile=true: {type(model).__name__} has no blocks to compile; set compile=false")
    compile_()


def _engine(task: Any, recipe: Recipe, stage: Stage, mesh: Mesh, ds_config: dict[str, Any]) -> Any:
    model = recipe.model_of(stage)
    if compiles(task, stage, ds_config):
        compile_blocks(task, model)
    layers = layer_of(model) if model.layers > 1 else None
    options: dict[str, Any] = {"layer_of": layers, "top": model.layers, "first_steps": waiting(task, stage)}
    make_optimizer: Any = partial(build_optimizer, optim=stage.optim, **options)
    factor = schedule(stage.optim, stage.steps)
    if mesh.pipe.size > 1:
        engine = build_pipeline_engine(task, stage.parallel, make_optimizer, factor, ds_config)
    else:
        optimizer = make_optimizer(task)
        log.info("trains %s", described(optimizer.param_groups, stage.optim))
        engine = build_engine(task, optimizer, factor, ds_config, mpu_of(mesh))
    if stage.ema is not None:
        begin_average(engine)
    return engine


def stage_ds_config(
    path: str, recipe: Recipe, stage: Stage, *, world: int | None = None, node: int | None = None
) -> dict[str, Any]:
    """The DeepSpeed JSON with the keys that follow from the stage and the number of ranks. `world` and `node`: the
    number of ranks, and of ranks on each node, of a run that starts elsewhere; by default those of this process's
    launcher. Raises ValueError with the first reason why recipe, JSON and ranks do not go together."""
    world = world or world_size()
    node = node or int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
    accumulation = stage.batch.accumulation
    # The ranks over which DeepSpeed divides a step's batch; it counts sequence ranks as data ranks.
    copies = max(world // (stage.parallel.tensor * stage.parallel.pipe), 1)
    config = load_ds_config(
        path,
        micro=max(stage.batch.total // (copies * accumulation), 1),
        accumulation=accumulation,
        world=copies,
        clip=stage.optim.clip,
    )
    check_legal(
        stage.parallel,
        world=world,
        config=config,
        counts=stage.batch.counts(),
        accumulation=accumulation,
        model=recipe.model_of(stage).splits(stage.experts),
        classes=stage.head_classes,
        compiled=bool(stage.compile),
        node=node,
    )
    return config
