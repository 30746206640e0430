"""What a plan counts: every parameter of a stage's real task, its FLOPs, and both per tensor and pipe rank.

Names of shapes: T rows of a micro-batch, D width, F inner width of an expert, R rows that heads read, V a vocabulary.
"""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from pretrain.batch import Layout
from pretrain.config import Recipe, Stage
from pretrain.contracts import ModelSizes
from pretrain.data.mixture import micro_layout
from pretrain.flops import Product
from pretrain.layers import PLAIN, Classifier
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.optim import parameter_groups
from pretrain.parallel.partition import cut
from pretrain.parallel.state import dense_shape
from pretrain.tasks.pipeline import block_flops
from pretrain.tasks.pretrain import head_products, layer_of

# What parallel/tensor.py divides over the tensor ranks, besides every Classifier; all else is whole on each of them.
SPLIT = re.compile(
    r"\.attention\.(q|k|v)\.|\.up\.|\.inner_norm\.|\.attention\.out\..*weight$|\.down\.weight$"
    r"|\.text_embed\.tokens\."
)


class Parameter(NamedTuple):
    """One parameter of a stage's task."""

    name: str
    numel: int  # elements in memory, with a vocabulary's padding
    split: bool  # whether the tensor ranks share it out
    group: int | None  # number of its parameter group in the optimizer; None: frozen
    part: int  # 0 the embeddings, 1 .. depth the blocks, depth + 1 the final norm and the heads
    real: int  # elements without the padding

    def elements(self, tensor: int) -> int:
        """Elements on one of `tensor` ranks."""
        return self.numel // tensor if self.split else self.numel


class Planned(NamedTuple):
    """A stage and the parameters of its task."""

    recipe: Recipe
    stage: Stage
    model: MultiwayConfig
    parameters: tuple[Parameter, ...]
    kept: int = 0  # bytes that every rank holds whole beside its parameters: a momentum teacher, its queue

    @property
    def sizes(self) -> ModelSizes:
        """The sizes that parallel.legal.problems checks."""
        return self.model.splits(self.stage.experts)

    def products(self, layout: Layout) -> list[Product]:
        """The matrix products of the stage's heads."""
        return head_products(self.stage.objectives, layout, self.model)


def planned(recipe: Recipe, stage: Stage) -> Planned:
    """Builds the stage's task on the meta device, where a tensor has a shape and no bytes.

    Raises ValueError for a model that is split over data ranks only.
    """
    model: Any = recipe.model_of(stage)
    if model.splits(stage.experts) is None:
        plannable = [n for n, s in recipe.stages.items() if recipe.model_of(s).splits(s.experts) is not None]
        way_out = (
            f"plan one of the others: {', '.join(plannable)}" if plannable else "start it on as many GPUs as there are"
        )
        raise ValueError(
            f"--stage trains a {type(model).__name__}, which is split over data ranks only and has no plan; {way_out}"
        )
    with torch.device("meta"):
        task = stage.task.build(model, stage, PLAIN, None)
    for name, value in task.named_parameters():
        value.requires_grad_(stage.trains(name))
    layers = layer_of(model)
    classifiers = tuple(f"{name}." for name, module in task.named_modules() if isinstance(module, Classifier))
    groups = parameter_groups(task, stage.optim, layer_of=layers)
    group_of = {id(value): number for number, group in enumerate(groups) for value in group["params"]}
    return Planned(
        recipe,
        stage,
        model,
        tuple(
            Parameter(
                name,
                value.numel(),
                SPLIT.search(name) is not None or name.startswith(classifiers),
                group_of.get(id(value)),
                layers(name),
                math.prod(dense_shape(value)),
            )
            for name, value in task.named_parameters()
        ),
        sum(value.numel() * value.element_size() for value in task.buffers()),
    )


def micro_batch_layout(planned: Planned, parts: int) -> Layout:
    """The micro-batch of one rank when a step is cut into `parts` of them (data ranks * accumulation)."""
    stage, model = planned.stage, planned.model
    patches = model.patches if set(stage.mix) != {"texts"} else 0
    return micro_layout(stage.mix, stage.batch.counts(), patches, parts)


def read_rows(planned: Planned, layout: Layout) -> int:
    """About how many rows the heads read: a row that two heads read counts twice."""
    return sum(product.rows for product in planned.products(layout))


def stage_runs(planned: Planned, layout: Layout, pipe: int) -> list[range]:
    """The parts of the model that each pipeline stage holds, cut as pretrain.tasks.pipeline cuts them."""
    bounds = _bounds(planned.model, planned.stage.objectives, layout, pipe)
    runs = [range(start + 1, stop + 1) for start, stop in pairwise(bounds)]
    runs[0] = range(0, runs[0].stop)
    runs[-1] = range(runs[-1].start, planned.model.depth + 2)
    return runs


@cache
def _bounds(model: MultiwayConfig, objectives: tuple[Any, ...], layout: Layout, pipe: int) -> tuple[int, ...]:
    return cut(block_flops(model, objectives, layout), pipe)


def parameters_of(planned: Planned, parts: range) -> list[Parameter]:
    """The parameters of a rank that holds these parts. A parameter that several pipeline stages share is on each."""
    tied = any(getattr(objective, "tied_text_head", False) for objective in planned.stage.objectives)
    last = planned.model.depth + 1

    def here(p: Parameter) -> bool:
        return (
            p.part in parts
            or p.name.startswith("encoder.relative_position.")
            or (tied and last in parts and p.name == "encoder.text_embed.tokens.weight")
        )

    return [p for p in planned.parameters if here(p)]


def target_elements(planned: Planned) -> int:
    """Parameters of the frozen visual tokenizer that makes a stage's image targets; 0 where none is needed."""
    size = _tokenizer(planned)
    if size is None:
        return 0
    with torch.device("meta"):
        return _count(size)


def target_flops(planned: Planned, layout: Layout) -> float:
    """FLOPs of the visual tokenizer's encoder for a micro-batch, forward only. It does not see pictures of a kind that
    is never masked."""
    size, masking = _tokenizer(planned), planned.stage.masking
    if size is None or masking is None:
        return 0.0
    alone = layout.images if masking.dual else layout.images - layout.dual
    seen = alone * bool(masking.image_ratio) + layout.pairs * bool(masking.pair_image_ratio)
    return size.encoder_flops(seen) / 3


def teachers(planned: Planned) -> dict[str, Any]:
    """{knob: the frozen model that the stage learns from}, whole on every rank; None for one that is no stage of this
    recipe, whose size the recipe does not say."""
    recipe, stage = planned.recipe, planned.stage
    knobs = {knob for objective in stage.objectives for knob in objective.lessons(Layout())}
    own = {knob: recipe.stages.get(name) for knob, name in stage.reads.items() if knob in knobs}
    return {knob: teacher and recipe.model_of(teacher) for knob, teacher in own.items()}


def teacher_elements(planned: Planned) -> int:
    """Parameters of the teachers that are known."""
    with torch.device("meta"):
        return sum(_encoder_count(model) for model in teachers(planned).values() if model is not None)


def teacher_flops(planned: Planned, layout: Layout) -> float:
    """FLOPs of their forward passes for a micro-batch."""
    known = teachers(planned)
    lessons = [lesson for objective in planned.stage.objectives for lesson in objective.lessons(layout).items()]
    return sum(known[knob].flops(seen) / 3 for knob, seen in lessons if known.get(knob) is not None)


@cache
def _encoder_count(model: Any) -> int:
    # As Distillation builds it.
    return sum(value.numel() for value in model.build(("vision", "language")).parameters())


def _tokenizer(planned: Planned) -> VQKDConfig | None:
    """The visual tokenizer whose codes the stage predicts; None where it predicts none."""
    stage, recipe, masking = planned.stage, planned.recipe, planned.stage.masking
    if masking is None or "vision" not in stage.experts or not (masking.image_ratio or masking.pair_image_ratio):
        return None
    named = recipe.stages.get(stage.visual_tokenizer or "")
    default = VQKDConfig(image_size=planned.model.image_size, patch_size=planned.model.patch_size)
    return named.model if named and isinstance(named.model, VQKDConfig) else default


@cache
def _count(size: VQKDConfig) -> int:
    return sum(value.numel() for value in size.build().state_dict().values())
