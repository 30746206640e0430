"""What a plan counts: every parameter of a stage's real task, its FLOPs, and both per tensor and pipe rank.

Names of shapes: T rows of a micro-batch, D width, F inner width of an expert, R rows that heads read, V a vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from pretrain.batch import Layout
from pretrain.config import Recipe, Stage
from pretrain.data.masking import Masking
from pretrain.metrics import flops_per_batch
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.visual_tokenizer.vqkd import VQKD, VQKDConfig
from pretrain.optim import parameter_groups
from pretrain.parallel.legal import ModelSizes
from pretrain.parallel.partition import cut
from pretrain.tasks.pipeline import block_flops
from pretrain.tasks.pretrain import PretrainTask
from pretrain.train import layer_of

# What parallel/tensor.py divides over the tensor ranks; all else is whole on each of them.
SPLIT = re.compile(
    r"\.attention\.(q|k|v)\.|\.up\.|\.inner_norm\.|\.attention\.out\..*weight$|\.down\.weight$"
    r"|\.text_embed\.tokens\.|^objectives\.masked\.(image|text)\."
)


class Parameter(NamedTuple):
    name: str
    numel: int
    split: bool  # over the tensor ranks
    group: int | None  # of the optimizer; None: frozen
    part: int  # 0 the embeddings, 1 .. depth the blocks, depth + 1 the final norm and the heads

    def held(self, tensor: int) -> int:
        """Elements on one of `tensor` ranks."""
        return self.numel // tensor if self.split else self.numel


class Planned(NamedTuple):
    """A stage as the plan sees it."""

    recipe: Recipe
    stage: Stage
    model: MultiwayConfig
    parameters: tuple[Parameter, ...]

    @property
    def sizes(self) -> ModelSizes:
        """What `legal.problems` asks for; a vocabulary that the stage does not build cannot be split wrongly."""
        m, names = self.model, [p.name for p in self.parameters]
        return ModelSizes(
            dim=m.dim,
            depth=m.depth,
            heads=m.heads,
            ffn_dim=m.ffn_dim,
            vocab_size=m.vocab_size if any("text_embed" in n or "masked.text" in n for n in names) else 0,
            image_codes=m.image_codes if any(n.startswith("objectives.masked.image") for n in names) else 0,
        )


def planned(recipe: Recipe, stage: Stage) -> Planned:
    """Builds the stage's task on the meta device, where a tensor has a shape and no bytes.

    Raises ValueError for a stage that trains a visual tokenizer.
    """
    if stage.tokenizer is not None:
        raise ValueError(
            "--stage trains a visual tokenizer, which fits on every GPU and is only split over data ranks; "
            f"plan one of the others: {', '.join(name for name, s in recipe.stages.items() if s.tokenizer is None)}"
        )
    model = replace(recipe.model, drop_path=stage.drop_path)
    with torch.device("meta"):
        task = PretrainTask(model, stage.experts, stage.objectives)
    for name, value in task.named_parameters():
        value.requires_grad_(any(fnmatch(name, pattern) for pattern in stage.trainable))
    groups = parameter_groups(task, stage.optim, layer_of=layer_of(model.depth))
    group_of = {id(value): number for number, group in enumerate(groups) for value in group["params"]}
    parts = layer_of(model.depth)
    return Planned(
        recipe,
        stage,
        model,
        tuple(
            Parameter(name, value.numel(), SPLIT.search(name) is not None, group_of.get(id(value)), parts(name))
            for name, value in task.named_parameters()
        ),
    )


def micro_layout(stage: Stage, model: MultiwayConfig, parts: int) -> Layout:
    """The micro-batch of one rank when a step is cut into `parts` of them (data ranks * accumulation)."""
    each = {kind: count // parts for kind, count in stage.batch.counts().items()}
    mix: dict[str, Any] = stage.mix
    texts = mix.get("texts") or mix.get("dual")
    dual = each.get("dual", 0)
    return Layout(
        images=each.get("images", 0) + dual,
        pairs=each.get("pairs", 0),
        texts=each.get("texts", 0) + dual,
        patches=model.patches if set(mix) != {"texts"} else 0,
        pair_len=mix["pairs"].text_len if "pairs" in mix else 0,
        text_len=texts.text_len if texts else 0,
    )


def read_rows(planned: Planned, layout: Layout) -> int:
    """Rows that heads read, about: the mask's share of them, or one of each sequence."""
    ratios = next((o for o in planned.stage.objectives if isinstance(o, Masking)), None)
    if ratios is None:
        return layout.images + layout.texts
    return sum(rows for rows, _ in ratios.head_rows(layout, planned.model))  # type: ignore[attr-defined]


def head_products(planned: Planned, layout: Layout) -> list[tuple[int, int]]:
    """(rows, outputs) of each head's product."""
    return [rows for objective in planned.stage.objectives for rows in objective.head_rows(layout, planned.model)]


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


def held_by(planned: Planned, parts: range) -> list[Parameter]:
    """The parameters of a rank that holds these parts: what several stages share is on each of them."""
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
    """FLOPs of its encoder's forward pass for a micro-batch. Pictures that are never hidden are not shown to it."""
    size = _tokenizer(planned)
    if size is None:
        return 0.0
    masking = next(o for o in planned.stage.objectives if isinstance(o, Masking))
    seen = layout.images * bool(masking.image_ratio) + layout.pairs * bool(masking.pair_image_ratio)
    pictures = Layout(images=seen, patches=size.grid**2 + 1)
    return (
        flops_per_batch(
            pictures, dim=size.dim, depth=size.depth, ffn_dim=4 * size.dim, patch_inputs=3 * size.patch_size**2
        )
        / 3
    )


def _tokenizer(planned: Planned) -> VQKDConfig | None:
    stage, recipe = planned.stage, planned.recipe
    masking = next((o for o in stage.objectives if isinstance(o, Masking)), None)
    if masking is None or "vision" not in stage.experts or not (masking.image_ratio or masking.pair_image_ratio):
        return None
    named = recipe.stages.get(stage.visual_tokenizer or "")
    default = VQKDConfig(image_size=recipe.model.image_size, patch_size=recipe.model.patch_size)
    return named.tokenizer if named and named.tokenizer else default


@cache
def _count(size: VQKDConfig) -> int:
    return sum(value.numel() for value in VQKD(size).state_dict().values())
