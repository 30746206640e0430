"""The plan's memory by part against the bytes that a tiny run really holds, on every rank."""

from __future__ import annotations

import gc
import json
import tempfile
import warnings
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pretrain.batch import DROP_PATH, Batch, Layout, make_batch
from pretrain.config import Recipe, Stage
from pretrain.objectives.momentum import MomentumContrast
from pretrain.parallel.sizes import Parallel
from pretrain.plan.memory import Cell, activations, block_bytes, moments
from pretrain.plan.model import planned
from pretrain.recipes import load_recipe
from pretrain.tasks.pipeline import PipelineTask, pipeline_bounds
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks

CLOSE = 0.05
CODES = 512  # of the recipe's visual tokenizer
RANKS, BUCKET, PERSISTENCE = 2, 200_000, 1000
PARTS = ("parameters", "gradients", "optimizer", "activations", "working", "buffers")


def tiny(**changes) -> tuple[Recipe, Stage]:
    recipe, stage = load_recipe("tiny", "fusion")
    # Larger than it is, so that the parts differ: the text head's matrix is cut off by no bucket.
    model = replace(recipe.model, vocab_size=1000, **changes)
    return replace(recipe, model=model), replace(stage, drop_path=0.1)


def a_batch(recipe: Recipe, layout: Layout, image_ratio: float = 0.4, text_ratio: float = 0.15) -> Batch:
    """Random contents, masked as the objective says: the pair's picture is whole in this recipe."""
    m, random = recipe.model, torch.Generator().manual_seed(1)
    side, pictures = m.image_size, layout.images + layout.pairs
    codes = torch.randint(0, CODES, (pictures, layout.patches), generator=random)
    masks = torch.rand(codes.shape, generator=random).argsort(1) < round(image_ratio * layout.patches)
    masks[layout.images :] = False
    texts = torch.randint(4, m.vocab_size, (layout.texts, layout.text_len), generator=random)
    pairs = torch.randint(4, m.vocab_size, (layout.pairs, layout.pair_len), generator=random)
    return make_batch(
        layout,
        images=torch.randint(0, 255, (pictures, 3, side, side), dtype=torch.uint8, generator=random),
        image_masks=masks,
        image_codes=codes,
        pair_tokens=pairs,
        text_tokens=texts,
        pair_masked=torch.rand(pairs.shape, generator=random).argsort(1) < layout.pair_len // 2,
        text_masked=torch.rand(texts.shape, generator=random).argsort(1) < round(text_ratio * layout.text_len),
        draws={DROP_PATH: torch.rand(layout.sequences, m.draws, generator=random)},
    )


def layout_of(recipe: Recipe, images: int = 8, pairs: int = 8, texts: int = 8) -> Layout:
    return Layout(images, pairs, texts, patches=recipe.model.patches, pair_len=24, text_len=40)


def ds_json(stage: int, bf16: bool, **zero) -> dict:
    own: dict = {"stage": stage}
    if stage:
        own |= {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
    if stage == 3:
        own |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_param_persistence_threshold": PERSISTENCE}
        own |= {"memory_efficient_linear": True}
    return {"zero_optimization": own | zero} | ({"bf16": {"enabled": True}} if bf16 else {})


# ---- what a rank holds: every storage once, by what it is for


def storages() -> dict[int, int]:
    """Address and bytes of every tensor's storage that Python can reach."""
    sizes: dict[int, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some deprecated objects complain when they are looked at
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    for tensor in tensors:
        for one in (tensor, tensor.grad if tensor.is_leaf else None):
            if one is not None and one.device.type == "cpu":
                sizes[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sizes


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def by_part(engine, foreign: set[int], saved: set[int]) -> dict[str, int]:
    """Bytes of each part that this rank holds right now; `saved` are the addresses of activations. Parameters that
    ZeRO-3 has gathered for a while are buffers, and what is none of these parts is at work."""
    adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
    parts = dict.fromkeys(saved, "activations")
    for value in engine.module.parameters():
        partitioned = hasattr(value, "ds_tensor")
        parts[address(value)] = "buffers" if partitioned and not value.ds_persist else "parameters"
        for copy in (value.ds_tensor, value.ds_secondary_tensor) if partitioned else ():
            if copy is not None:  # the second is hpZ's
                parts[address(copy)] = "parameters"
        if value.grad is not None:
            parts[address(value.grad)] = "gradients"
    masters = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    masters = masters or getattr(engine.optimizer, "single_partition_of_fp32_groups", [])
    for master in masters:
        parts.setdefault(address(master), "optimizer")
        if master.grad is not None:
            parts[address(master.grad)] = "gradients"
    for state in adam.state.values():
        parts |= {address(value): "optimizer" for value in state.values() if isinstance(value, Tensor) and value.ndim}
    for name in ("averaged_gradients", "all_grad_tensors"):
        for tensors in getattr(engine.optimizer, name, {}).values():
            parts |= {address(one): "gradients" for one in tensors or [] if isinstance(one, Tensor)}
    for bucket in getattr(engine.optimizer, "ipg_buckets", {}).values():
        own = [bucket.buffer] if isinstance(bucket.buffer, Tensor) else bucket.buffer or []
        parts |= {address(one): "buffers" for one in own}
    flat = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if flat is not None:
        parts[address(flat)] = "gradients"
    totals = dict.fromkeys(PARTS, 0)
    for place, size in storages().items():
        if place not in foreign and size >= 64:
            totals[parts.get(place, "working")] += size
    return totals


class Watch:
    """Notes the largest bytes of each part in the backward pass and in the optimizer's step."""

    def __init__(self, engine, foreign: set[int]):
        self.engine, self.foreign, self.saved = engine, foreign, set()
        self.seen: dict[str, dict[str, int]] = {}
        adam = getattr(engine.optimizer, "optimizer", engine.optimizer)
        step, forward = adam.step, engine.module.forward
        adam.step = lambda *args, **more: (self.note("step"), step(*args, **more))[1]
        engine.module.forward = lambda *args, **more: self.forward(forward, *args, **more)
        if engine.zero_optimization_stage() in (1, 2):
            reduce = engine.optimizer.reduce_gradients
            engine.optimizer.reduce_gradients = lambda **more: (self.note("backward"), reduce(**more))[1]
        next(engine.module.encoder.blocks.children()).register_full_backward_hook(lambda *_: self.note("backward"))

    def note(self, moment: str) -> None:
        gc.collect()
        now, most = (
            by_part(self.engine, self.foreign, self.saved),
            self.seen.setdefault(moment, dict.fromkeys(PARTS, 0)),
        )
        self.seen[moment] = {part: max(size, most[part]) for part, size in now.items()}

    def forward(self, forward, *args, **more):
        """Remembers what autograd keeps for the backward pass."""
        own = {address(value) for value in self.engine.module.parameters()} | self.foreign

        def keep(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, torch.nn.Parameter) and address(tensor) not in own:
                self.saved.add(address(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = forward(*args, **more)
        loss = out["loss"] if isinstance(out, dict) else out
        loss.register_hook(lambda grad: self.note("backward"))
        return out


class Case(NamedTuple):
    config: dict
    accumulation: int = 1
    parallel: Parallel = Parallel()

    @property
    def cell(self) -> Cell:
        data = RANKS // self.parallel.model
        layout = layout_of(tiny()[0])
        return Cell(self.config, self.parallel, data, layout, self.accumulation, packed=False, targets=False)


def measure(cases: list[Case]) -> list[tuple[dict[str, int], dict[str, int]]]:
    """Of each case's second step on this rank: in the last micro-step's backward, and at Adam's step."""
    from pretrain.parallel.pipeline import pipeline_step

    results = []
    for case in cases:
        batch = a_batch(tiny()[0], layout_of(tiny()[0]))
        foreign = {address(tensor) for _, tensor in batch.tensors()}
        gc.collect()
        gc.freeze()  # `storages` does not see what is there already
        watch = Watch(an_engine(case), foreign)
        for _ in range(2):
            watch.seen.clear()
            if case.parallel.pipe > 1:
                pipeline_step(watch.engine, [batch] * case.accumulation)
                continue
            for micro in range(case.accumulation):
                watch.saved = set()
                watch.engine.backward(watch.engine(batch)["loss"])
                if micro == case.accumulation - 1 and watch.engine.zero_optimization_stage() == 0:
                    watch.note("backward")
                watch.engine.step()
        results.append((watch.seen["backward"], watch.seen["step"]))
        watch.engine.destroy()
        del watch
    return results


def an_engine(case: Case):
    from pretrain.optim import build_optimizer, schedule
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine
    from pretrain.parallel.mesh import create_mesh, mpu_of
    from pretrain.parallel.pipeline import build_pipeline_engine
    from pretrain.parallel.tensor import parallel_layers

    recipe, stage = tiny()
    model, mesh = recipe.model, create_mesh(case.parallel)
    layers, factor = parallel_layers(mesh), schedule(stage.optim, 10)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "ds.json"
        path.write_text(json.dumps(case.config))
        config = load_ds_config(path, micro=24, accumulation=case.accumulation, world=mesh.data.size, clip=1.0)
    if case.parallel.pipe == 1:
        task = PretrainTask(model, stage.experts, stage.objectives, layers, drop_path=stage.drop_path)
        return build_engine(task, build_optimizer(task, stage.optim), factor, config, mpu_of(mesh))
    layout = layout_of(recipe)
    bounds = pipeline_bounds(model, stage.objectives, layout, case.parallel.pipe)
    own = {"layout": layout, "bounds": bounds, "stage": mesh.pipe.rank, "drop_path": stage.drop_path}
    part = PipelineTask(model, stage.experts, stage.objectives, layers, **own)
    return build_pipeline_engine(part, case.parallel, partial(build_optimizer, optim=stage.optim), factor, config)


def compare(cases: list[Case]) -> None:
    """States and buffers within 5 % on every rank and at both moments, activations in the backward pass."""
    ranks, (recipe, stage) = run_ranks(measure, RANKS, cases, timeout=240), tiny()
    for number, case in enumerate(cases):
        for rank, moments_of in enumerate(ranks):
            pipe = case.parallel.pipe > 1
            want = moments(planned(recipe, stage), case.cell, stage=rank if pipe else 0)
            for plan, real in zip(want, moments_of[number], strict=True):
                here = (case, rank, plan.moment, real)
                for part in ("parameters", "gradients", "optimizer"):
                    assert real[part] == pytest.approx(getattr(plan, part), rel=CLOSE), (*here, part)
                if plan.moment == "backward":
                    assert real["working"] <= plan.working, here
                if plan.moment == "backward" and pipe:
                    # What a stage receives is both a buffer and saved for the backward pass.
                    both = real["activations"] + real["buffers"]
                    assert both == pytest.approx(plan.activations + plan.buffers, rel=CLOSE), here
                elif plan.moment == "backward":
                    assert real["activations"] == pytest.approx(plan.activations, rel=CLOSE), here
                    assert real["buffers"] == pytest.approx(plan.buffers, rel=CLOSE), here


PLAIN = [Case(ds_json(stage, bf16), n) for stage, bf16, n in ((0, False, 1), (1, True, 2), (2, False, 2), (2, True, 1))]
NEAR = {
    "stage3_max_reuse_distance": 200_000,
    "stage3_max_live_parameters": 300_000,
    "stage3_prefetch_bucket_size": 100_000,
}


@pytest.mark.slow
def test_every_zero_stage_holds_what_was_planned():
    compare(
        [*PLAIN, Case(ds_json(3, bf16=False, **NEAR)), Case(ds_json(3, bf16=True, zero_hpz_partition_size=2, **NEAR))]
    )


@pytest.mark.slow
def test_tensor_ranks_hold_what_was_planned():
    compare([Case(ds_json(stage, bf16), 2, Parallel(tensor=2)) for stage, bf16 in ((1, True), (3, False))])


@pytest.mark.slow
def test_pipeline_stages_hold_what_was_planned():
    compare([Case(ds_json(1, bf16), 3, Parallel(pipe=2)) for bf16 in (True,)])


SMALLER = {"attention": "per_modality", "sub_norm": True, "fusion_layers": 0}
MODELS = {"as in the paper": {}, "as released": SMALLER, "VLMo's scales": {"layer_scale": 0.1, "text_norm": True}}
PRUNED = {"pruned, as released": SMALLER | {"heads": 2, "head_dim": 32}}
KINDS = {"all": (8, 8, 8), "images": (8, 0, 0), "pairs": (0, 8, 0), "texts": (0, 0, 8)}


def saved_bytes(recipe: Recipe, stage: Stage, batch: Batch, dtype: torch.dtype, every: int) -> int:
    """What autograd keeps of one forward pass, each storage once, and what checkpointing keeps for it."""
    options = {"drop_path": stage.drop_path, "checkpointing": every}
    task = PretrainTask(recipe.model, stage.experts, stage.objectives, **options).to(dtype)
    own = {address(tensor) for _, tensor in batch.tensors()} | {address(value) for value in task.parameters()}
    own |= {address(value) for value in task.buffers()}
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[address(tensor)] = tensor
        return tensor

    for number, block in enumerate(task.encoder.blocks):
        if every and number % every == 0:
            block.register_forward_pre_hook(lambda _, inputs: saved.update({address(inputs[0]): inputs[0]}))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task(batch)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)


@pytest.mark.parametrize(("model", "kinds"), [*product(MODELS, KINDS), ("pruned, as released", "pairs")])
def test_saved_activations(model, kinds):
    recipe, stage = tiny(**(MODELS | PRUNED)[model])
    layout = layout_of(recipe, *KINDS[kinds])
    for dtype in (torch.float32, torch.bfloat16):
        batch = a_batch(recipe, layout)
        cell = Cell(ds_json(1, dtype == torch.bfloat16), Parallel(), 1, layout, packed=False, targets=False)
        want = activations(planned(recipe, stage), cell, range(recipe.model.depth + 2))
        assert saved_bytes(recipe, stage, batch, dtype, every=0) == pytest.approx(want, rel=CLOSE), dtype


@pytest.mark.parametrize(("name", "size"), [("prototypes", 256), ("prototypes", 8192), ("queue", 64), ("queue", 8192)])
def test_what_heads_with_a_teacher_save(name, size):
    """Logits are the most of it at published sizes. The plan may count a little more: rows that no head reads."""
    recipe, stage = load_recipe("tiny_siglip2", "dense")
    contrast, distilled = stage.objectives
    teaching = (MomentumContrast(64, queue=size),)
    if name == "prototypes":
        teaching = (contrast, replace(distilled, prototypes=size))
    stage = replace(stage, objectives=teaching)
    layout = Layout(images=8, texts=8, patches=recipe.model.patches, text_len=24, dual=8)
    draws = {DROP_PATH: recipe.model.draws} | stage.draws
    batch = make_batch(
        layout,
        images=torch.randint(0, 255, (8, 3, 64, 64), dtype=torch.uint8),
        text_tokens=torch.randint(4, 200, (8, 24)),
        draws={name: torch.rand(layout.sequences, count) for name, count in draws.items()},
    )
    for dtype in (torch.float32, torch.bfloat16):
        cell = Cell(ds_json(1, dtype == torch.bfloat16), Parallel(), 1, layout, packed=False, targets=False)
        real, plan = saved_bytes(recipe, stage, batch, dtype, every=0), moments(planned(recipe, stage), cell)[0]
        assert 0.95 * real <= plan.activations <= 1.25 * real, dtype


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_keeps_the_inputs_of_every_nth_block(every):
    recipe, stage = tiny()
    layout = layout_of(recipe)
    plan, cell = (
        planned(recipe, stage),
        Cell(ds_json(1, False), Parallel(), 1, layout, 1, every, packed=False, targets=False),
    )
    whole = activations(plan, cell, range(recipe.model.depth + 2))
    # Without what is computed again in the backward pass, one run of blocks at a time.
    again = max(
        sum(block_bytes(plan, cell, number) for number in range(first, min(first + every, 5)))
        for first in (1, 1 + every)
    )
    saved = whole - again + layout.rows * recipe.model.dim * 4
    assert saved_bytes(recipe, stage, a_batch(recipe, layout), torch.float32, every) == pytest.approx(saved, rel=CLOSE)
