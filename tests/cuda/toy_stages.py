"""The stages of every recipe with few layers, small batches and one small set of shards: everything else is theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from tests.toys import encoded, picture, write_source, write_text_model

SEQUENCES, DEPTH = 4, 2  # of each kind in a batch; blocks of each stack
CAPTIONS = [f"a {size} {colour} {shape} left of the tree" for size in ("big", "small") for colour in ("red", "blue")
            for shape in ("dog", "cat")]  # fmt: skip


def write_toys(place: Path) -> Path:
    """Shards whose samples have what any source reads, and the files that stand beside them."""
    shards = [[_sample(4 * shard + number) for number in range(4)] for shard in range(2)]
    write_source(place / "shards", shards)
    write_text_model(place / "text.model", CAPTIONS, 60)
    return place


def _sample(number: int) -> dict[str, Any]:
    text, look = CAPTIONS[number], encoded(picture(number))
    said = {"label": number % 2, "label_name": "", "captions": [text, text[:20]]}
    return {"key": f"{number:04d}", "jpg": look, "jpe": look, "txt": text, "json": json.dumps(said).encode()}


def toy(recipe: Recipe, name: str, data: Path) -> tuple[Recipe, Stage]:
    """The recipe, and its stage `name`, over the shards of `write_toys`."""
    # The loader leaves as much as it can to the device.
    loading = replace(recipe.loading, workers=0, jitter_on_device=True, streams=1, block_shards=1)
    stages = {key: _toy_stage(stage, data) for key, stage in recipe.stages.items()}
    shallow = replace(recipe, model=_shallow(recipe.model), loading=loading, text_tokenizer=str(data / "text.model"))
    made = replace(shallow, stages=stages)
    return made, made.stages[name]


def _toy_stage(stage: Stage, data: Path) -> Stage:
    counts = dict.fromkeys(stage.batch.counts(), SEQUENCES)
    model = None if stage.model is None else _shallow(stage.model)
    moved = {key: _over(value, data) for key, value in (("mix", stage.mix), ("evals", stage.evals))}
    return replace(stage, model=model, batch=BatchSize(**counts), **moved)


def _over(value: Any, data: Path) -> Any:
    """Sources, wherever they stand, over the shards in `data`; evaluations of a few samples."""
    if isinstance(value, dict):
        return {key: _over(each, data) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(_over(each, data) for each in value)
    if not is_dataclass(value) or isinstance(value, type):
        return value
    own = {f.name: getattr(value, f.name) for f in fields(value)}
    changed = {name: str(data / name) if name == "shards" else _over(each, data) for name, each in own.items()}
    changed |= {name: least for name, least in (("samples", 8), ("batch", SEQUENCES)) if name in own}
    return replace(value, **changed)  # type: ignore[type-var]


def _shallow(model: Any) -> Any:
    """Widths, heads, sizes and vocabularies stay."""
    own = {f.name: getattr(model, f.name) for f in fields(model)}
    if isinstance(model, VQKDConfig):
        return replace(model, depth=1, decoder_depth=min(model.decoder_depth, 1))
    depths = {name: min(value, DEPTH) for name, value in own.items() if name.endswith("depth")}
    if "fusion_layers" in own:
        depths |= {"depth": DEPTH + 1, "fusion_layers": min(own["fusion_layers"], 1)}
    if "text_at" in own:  # CoAttention
        depths |= {"text_at": (0, 1), "image_at": (0, 1)}
    depths |= {name: _shallow_tower(own[name]) for name in ("vision", "text") if name in own}
    return replace(model, **depths)


SHALLOW: dict[str, Callable[[Any], dict[str, Any]]] = {
    "resnet": lambda settings: {"depths": [1] * len(settings.get("hidden_sizes", range(4)))},
    "efficientnet": lambda settings: {"depth_coefficient": 0.3},
}


def _shallow_tower(tower: Any) -> Any:
    less = SHALLOW.get(tower.kind, lambda _: {"num_hidden_layers": DEPTH})(tower.settings)
    return replace(tower, settings=tower.settings | less)


def visual_tokenizer(recipe: Recipe, stage: Stage) -> Any:
    """One with fresh weights that fits what the stage predicts, frozen as load_visual_tokenizer leaves it."""
    model: Any = recipe.model_of(stage)
    cfg = VQKDConfig(dim=32, depth=1, heads=2, decoder_depth=0, image_size=model.image_size,
                     patch_size=model.patch_size, codes=16, code_dim=8)  # fmt: skip
    return cfg.build().eval().requires_grad_(False)
