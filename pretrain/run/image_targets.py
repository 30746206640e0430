"""What a stage learns from: the frozen visual tokenizer's codes, the teacher of a tokenizer, and the files of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pretrain.batch import Batch
from pretrain.checkpoint.weights import WEIGHTS, read_weights, weights_digest
from pretrain.config import Recipe, Stage
from pretrain.data.codes import stored_coding
from pretrain.data.masking import Masking
from pretrain.data.shards.manifest import fill_variables, load_manifest
from pretrain.data.sources import TextShards
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.visual_tokenizer.teachers import ClipTeacher, EncoderTeacher, PixelTeacher
from pretrain.models.visual_tokenizer.vqkd import VQKD, VQKDConfig


def masking_of(stage: Stage) -> Masking | None:
    """What the loader hides: as the stage's masked objective says."""
    return next((objective for objective in stage.objectives if isinstance(objective, Masking)), None)


def weights_path(name: str, run_dir: Path, knob: str) -> Path:
    """The weights that a stage's name or a file's path stands for. Raises ValueError if they are not there."""
    path = run_dir / name / WEIGHTS
    if path.is_file():
        return path
    plain = Path(fill_variables(name, knob)).expanduser()
    if plain.is_dir():
        plain = plain / WEIGHTS
    if plain.is_file():
        return plain
    raise ValueError(
        f"{knob}={name}: neither {path} nor {plain} exists; "
        f"run the stage {name!r} to its end first, or give the path of a weights.safetensors"
    )


def image_targets(recipe: Recipe, stage: Stage, run_dir: Path, device: torch.device) -> Callable[[Batch], Batch]:
    """A function that adds the frozen visual tokenizer's codes to a batch, on the device. Codes that the loader read
    stay; raises ValueError if they are another tokenizer's."""
    masking = masking_of(stage)
    if masking is None or not (masking.image_ratio or masking.pair_image_ratio) or "vision" not in stage.experts:
        return lambda batch: batch
    seen = {kind for kind in stage.mix if masking.ratios(kind)[0]}
    stored = {kind for kind in seen if getattr(stage.mix[kind], "codes", None)}
    for kind in stored:
        _check_stored(kind, stage, run_dir)
    # Held-out pictures have no stored codes, so that an evaluation may need what training does not.
    tokenizer = load_visual_tokenizer(recipe, stage, run_dir).to(device) if seen - stored or not seen else None

    def add_codes(batch: Batch) -> Batch:
        nonlocal tokenizer
        have = stored if batch.image_codes is not None else set()
        # Image-only pictures come first; where a kind is never hidden, nobody asks for its codes.
        first = 0 if masking.image_ratio and not have & {"images", "dual"} else batch.layout.images
        last = len(batch.images) if masking.pair_image_ratio and "pairs" not in have else batch.layout.images
        none = torch.zeros_like(batch.image_masks, dtype=torch.long)
        codes = none if batch.image_codes is None else batch.image_codes
        if first < last or not have:
            tokenizer = tokenizer or load_visual_tokenizer(recipe, stage, run_dir).to(device)
            codes[first:last] = picture_codes(tokenizer, batch.images[first:last])
        return replace(batch, image_codes=codes)

    return add_codes


def picture_codes(tokenizer: VQKD, images: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 3, H, W] -> int64 [N, P], in bf16 on a GPU: both what pretrain.encode_images stores and what is made
    in training, so that they are equal."""
    device = images.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return tokenizer.encode(images)


def _check_stored(kind: str, stage: Stage, run_dir: Path) -> None:
    source = stage.mix[kind]
    assert not isinstance(source, TextShards) and source.codes
    made_by = stored_coding(load_manifest(source.shards), source.codes).tokenizer
    path = _visual_tokenizer_path(stage, run_dir)
    if made_by != (wanted := weights_digest(path)):
        raise ValueError(
            f"mix.{kind}.codes={source.codes}: the stored codes are of the visual tokenizer {made_by[:12]}, but {path} "
            f"is {wanted[:12]}; run python -m pretrain.encode_images with this tokenizer and another --name, or set "
            "visual_tokenizer to the one that made them"
        )


def load_visual_tokenizer(recipe: Recipe, stage: Stage, run_dir: Path) -> VQKD:
    path = _visual_tokenizer_path(stage, run_dir)
    state, config = read_weights(path)
    if "tokenizer" not in config:
        raise ValueError(f"visual_tokenizer={stage.visual_tokenizer}: {path} holds no visual tokenizer; name one")
    tokenizer = VQKD(VQKDConfig(**fields_of(config["tokenizer"])))
    if tokenizer.cfg.codes > recipe.model.image_codes or tokenizer.cfg.patch_size != recipe.model.patch_size:
        raise ValueError(
            f"visual_tokenizer={path} has {tokenizer.cfg.codes} codes of {tokenizer.cfg.patch_size}-pixel patches, but "
            f"model.image_codes={recipe.model.image_codes} and model.patch_size={recipe.model.patch_size}; use one size"
        )
    tokenizer.load_state_dict({key.removeprefix("tokenizer."): value for key, value in state.items()})
    return tokenizer.eval().requires_grad_(False)


def _visual_tokenizer_path(stage: Stage, run_dir: Path) -> Path:
    if stage.visual_tokenizer is None:
        raise ValueError("visual_tokenizer is not set but the stage predicts image codes; name a tokenizer stage")
    return weights_path(stage.visual_tokenizer, run_dir, "visual_tokenizer")


def teacher_of(stage: Stage, run_dir: Path) -> PixelTeacher | ClipTeacher | EncoderTeacher:
    assert stage.tokenizer is not None
    if stage.teacher == "pixels":
        return PixelTeacher(stage.tokenizer.patch_size)
    if stage.teacher.startswith("clip:"):
        return ClipTeacher(
            Path(fill_variables(stage.teacher.removeprefix("clip:"), "teacher")).expanduser(), stage.tokenizer.grid
        )
    state, config = read_weights(weights_path(stage.teacher, run_dir, "teacher"))
    if "model" not in config or "encoder.vision_embed.proj.weight" not in state:
        raise ValueError(
            f"teacher={stage.teacher} holds no encoder with vision; give a stage that has one, or clip:DIR"
        )
    encoder = MultiwayEncoder(MultiwayConfig(**fields_of(config["model"])), experts=("vision",))
    encoder.load_state_dict({name: state[f"encoder.{name}"] for name in encoder.state_dict()})
    return EncoderTeacher(encoder, stage.tokenizer.grid)


def fields_of(config: dict) -> dict:
    """The fields of a config.json's section, without the name of its class."""
    return {key: value for key, value in config.items() if key != "class"}
