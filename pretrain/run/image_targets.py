"""The targets of masked image modeling: the frozen visual tokenizer's codes, stored or computed in training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pretrain.batch import Batch, Layout
from pretrain.checkpoint.weights import weights_digest
from pretrain.config import Recipe, Stage
from pretrain.contracts import Model
from pretrain.data.codes import stored_coding
from pretrain.data.shards.manifest import load_manifest
from pretrain.models.visual_tokenizer.vqkd import VQKD, VQKDConfig
from pretrain.run.stored_weights import read_model, weights_path
from pretrain.tensors import load_tensors


def image_targets(recipe: Recipe, stage: Stage, run_dir: Path, device: torch.device) -> Callable[[Batch], Batch]:
    """A function that adds the frozen visual tokenizer's codes to a batch, on `device`. Codes that the loader read are
    kept. Raises ValueError if these are another tokenizer's."""
    if not (hidden := _hidden(stage)):
        return lambda batch: batch
    stored = {kind for kind in hidden & set(stage.mix) if getattr(stage.mix[kind], "codes", None)}
    for kind in stored:
        _check_stored(kind, stage, run_dir)
    # Held-out pictures have no stored codes, so that an evaluation may need the tokenizer even if training does not.
    online = bool(hidden & set(stage.mix) - stored) or not hidden & set(stage.mix)
    tokenizer = load_visual_tokenizer(recipe, stage, run_dir).to(device) if online else None

    def add_codes(batch: Batch) -> Batch:
        nonlocal tokenizer
        missing = hidden - (stored if batch.image_codes is not None else set())
        spans = [span for kind, span in _pictures(batch.layout).items() if kind in missing and span.start < span.stop]
        codes = batch.image_codes
        if codes is None:
            codes = torch.zeros_like(batch.image_masks, dtype=torch.long)
        if spans:
            tokenizer = tokenizer or load_visual_tokenizer(recipe, stage, run_dir).to(device)
            # In one call over all spans: pictures between them have stored codes or need none.
            first, last = min(span.start for span in spans), max(span.stop for span in spans)
            made = picture_codes(tokenizer, batch.images[first:last])
            for span in spans:
                codes[span] = made[span.start - first : span.stop - first]
        return batch.with_tensors({"image_codes": codes})

    return add_codes


def predicts_codes(stage: Stage) -> bool:
    """Whether patches of its mix's pictures are hidden, so that training needs their codes."""
    return bool(_hidden(stage) & set(stage.mix))


def _hidden(stage: Stage) -> set[str]:
    """The kinds of which patches are hidden; none in a stage that does not build the vision expert."""
    if (masking := stage.masking) is None or "vision" not in stage.experts:
        return set()
    return {kind for kind in ("images", "dual", "pairs") if masking.ratios(kind)[0]}


def _pictures(layout: Layout) -> dict[str, slice]:
    """Where each kind's pictures stand in a batch."""
    alone = layout.images - layout.dual
    return {
        "images": slice(0, alone),
        "dual": slice(alone, layout.images),
        "pairs": slice(layout.images, layout.images + layout.pairs),
    }


def picture_codes(tokenizer: VQKD, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> int64 [N, P], in bf16 on a GPU. pretrain.encode_images and training both call it, so that
    stored codes equal those that training would compute."""
    device = images.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return tokenizer.encode(images)


def _check_stored(kind: str, stage: Stage, run_dir: Path) -> None:
    source: Any = stage.mix[kind]
    made_by = stored_coding(load_manifest(source.shards), source.codes).tokenizer
    path = weights_path(_named(stage), run_dir, "visual_tokenizer")
    if made_by != (wanted := weights_digest(path)):
        raise ValueError(
            f"mix.{kind}.codes={source.codes}: the stored codes are of the visual tokenizer {made_by[:12]}, but {path} "
            f"is {wanted[:12]}; run python -m pretrain.encode_images with this tokenizer and another --name, or set "
            "visual_tokenizer to the one that made them"
        )


def load_visual_tokenizer(recipe: Recipe, stage: Stage, run_dir: Path) -> VQKD:
    """The frozen visual tokenizer that the stage names. ValueError if it is missing or does not fit the stage."""
    name = _named(stage)
    state, cfg = read_model(name, "visual_tokenizer", run_dir=run_dir, recipe=recipe)
    check_tokenizer(cfg, name, recipe, stage)
    assert isinstance(cfg, VQKDConfig)
    tokenizer = cfg.build()
    own = {key.removeprefix("tokenizer."): value for key, value in state.items()}
    load_tensors(tokenizer, own, f"visual_tokenizer={name}")
    return tokenizer.eval().requires_grad_(False)


def check_tokenizer(cfg: Model, name: str, recipe: Recipe, stage: Stage) -> None:
    """ValueError if the model `cfg` that visual_tokenizer=`name` stands for does not fit what the stage predicts."""
    if not isinstance(cfg, VQKDConfig):
        raise ValueError(f"visual_tokenizer={name} holds no visual tokenizer but a {type(cfg).__name__}; name one")
    classes, patch_size = _image_codes(stage), recipe.model_of(stage).patch_size
    if cfg.codes > classes or cfg.patch_size != patch_size:
        raise ValueError(
            f"visual_tokenizer={name} has {cfg.codes} codes of {cfg.patch_size}-pixel patches, but the objective's "
            f"image_codes={classes} and model.patch_size={patch_size}; use one size"
        )


def _image_codes(stage: Stage) -> int:
    """The number of classes of the stage's image head; 0 without one."""
    return max((getattr(objective, "image_codes", 0) for objective in stage.objectives), default=0)


def _named(stage: Stage) -> str:
    if stage.visual_tokenizer is None:
        raise ValueError("visual_tokenizer is not set but the stage predicts image codes; name a tokenizer stage")
    return stage.visual_tokenizer
