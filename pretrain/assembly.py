"""From a recipe's stage to the objects that run it: the task, its loader, the visual tokenizer, the files it reads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from pretrain.batch import Batch
from pretrain.config import Recipe, Stage, stage_hash, to_json
from pretrain.data.loader import Loader
from pretrain.data.manifest import fill_variables
from pretrain.data.masking import Masking
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.distributed import world_size
from pretrain.models.multiway import MultiwayConfig, MultiwayEncoder
from pretrain.models.teachers import ClipTeacher, EncoderTeacher, PixelTeacher
from pretrain.models.vqkd import VQKD, VQKDConfig
from pretrain.parallel.ds_config import load_ds_config
from pretrain.task import PretrainTask, TokenizerTask
from pretrain.weights import WEIGHTS, load_handover, read_weights

log = logging.getLogger(__name__)


def build_task(recipe: Recipe, stage: Stage, run_dir: Path) -> PretrainTask | TokenizerTask:
    """The stage's task with fresh weights, on the CPU; only what the stage trains or needs is built."""
    torch.manual_seed(recipe.seed)
    if stage.tokenizer is not None:
        if stage.transform.size != stage.tokenizer.image_size:
            raise ValueError(
                f"transform.size={stage.transform.size} but tokenizer.image_size={stage.tokenizer.image_size}; "
                "use one size"
            )
        teacher = _teacher(stage, run_dir)
        if teacher.dim != stage.tokenizer.target_dim or teacher.distill != stage.tokenizer.distill:
            raise ValueError(
                f"teacher={stage.teacher} gives {teacher.dim} numbers a patch, to be learned by {teacher.distill}, but "
                f"tokenizer.target_dim={stage.tokenizer.target_dim} and tokenizer.distill={stage.tokenizer.distill}; "
                "set them to the teacher's"
            )
        return TokenizerTask(stage.tokenizer, teacher)
    if any(kind != "texts" for kind in stage.mix) and stage.transform.size != recipe.model.image_size:
        raise ValueError(
            f"transform.size={stage.transform.size} but model.image_size={recipe.model.image_size}; use one size"
        )
    model = replace(recipe.model, drop_path=stage.drop_path, activation_checkpointing=stage.activation_checkpointing)
    task = PretrainTask(model, stage.experts, stage.objectives)
    for name, parameter in task.named_parameters():
        parameter.requires_grad_(any(fnmatch(name, pattern) for pattern in stage.trainable))
    for pattern in stage.trainable:
        if not any(fnmatch(name, pattern) for name, _ in task.named_parameters()):
            raise ValueError(f"trainable={pattern!r} matches no parameter of the stage; names look like {name!r}")
    return task


def stage_ds_config(path: str, stage: Stage) -> dict[str, Any]:
    """The DeepSpeed JSON with what the stage and the number of ranks derive."""
    parts = world_size() * stage.batch.accumulation
    return load_ds_config(
        path,
        micro=max(stage.batch.total // parts, 1),
        accumulation=stage.batch.accumulation,
        world=world_size(),
        clip=stage.optim.clip,
    )


def build_loader(recipe: Recipe, stage: Stage, stage_dir: Path | None, *, rank: int, world: int) -> Loader:
    """The stage's training batches for this rank; writes its traces into `stage_dir`."""
    return Loader(
        stage.mix,
        counts=stage.batch.counts(),
        accumulation=stage.batch.accumulation,
        rank=rank,
        world=world,
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


def masking_of(stage: Stage) -> Masking | None:
    """What the loader hides: as the stage's masked objective says."""
    return next((objective for objective in stage.objectives if isinstance(objective, Masking)), None)


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


def load_init(task: torch.nn.Module, stage: Stage, run_dir: Path) -> Path | None:
    """Fill the task from `stage.init_from`; each choice is one log line. -> the file, for what it holds besides."""
    if stage.init_from is None:
        log.info("weights: from scratch")
        return None
    path = weights_path(stage.init_from, run_dir, "init_from")
    found = load_handover(task, path)
    log.info("weights: %d tensors from %s", len(found.loaded), path)
    if found.missing:
        log.info("weights from scratch (not in that file): %s", _shorten(found.missing))
    if found.unexpected:
        log.info("weights passed on untouched (this stage does not build them): %s", _shorten(found.unexpected))
    return path


def image_targets(recipe: Recipe, stage: Stage, run_dir: Path, device: torch.device) -> Callable[[Batch], Batch]:
    """A function that adds the frozen visual tokenizer's codes to a batch, on the device."""
    masking = masking_of(stage)
    if masking is None or not (masking.image_ratio or masking.pair_image_ratio) or "vision" not in stage.experts:
        return lambda batch: batch
    tokenizer = load_visual_tokenizer(recipe, stage, run_dir).to(device)

    def add_codes(batch: Batch) -> Batch:
        # Image-only pictures come first; where a kind is never hidden, nobody asks for its codes.
        first = 0 if masking.image_ratio else batch.layout.images
        last = None if masking.pair_image_ratio else batch.layout.images
        codes = torch.zeros_like(batch.image_masks, dtype=torch.long)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            codes[first:last] = tokenizer.encode(batch.images[first:last])
        return replace(batch, image_codes=codes)

    return add_codes


def load_visual_tokenizer(recipe: Recipe, stage: Stage, run_dir: Path) -> VQKD:
    if stage.visual_tokenizer is None:
        raise ValueError("visual_tokenizer is not set but the stage predicts image codes; name a tokenizer stage")
    path = weights_path(stage.visual_tokenizer, run_dir, "visual_tokenizer")
    state, config = read_weights(path)
    if "tokenizer" not in config:
        raise ValueError(f"visual_tokenizer={stage.visual_tokenizer}: {path} holds no visual tokenizer; name one")
    tokenizer = VQKD(VQKDConfig(**_fields(config["tokenizer"])))
    if tokenizer.cfg.codes > recipe.model.image_codes or tokenizer.cfg.patch_size != recipe.model.patch_size:
        raise ValueError(
            f"visual_tokenizer={path} has {tokenizer.cfg.codes} codes of {tokenizer.cfg.patch_size}-pixel patches, but "
            f"model.image_codes={recipe.model.image_codes} and model.patch_size={recipe.model.patch_size}; use one size"
        )
    tokenizer.load_state_dict({key.removeprefix("tokenizer."): value for key, value in state.items()})
    return tokenizer.eval().requires_grad_(False)


def weights_config(recipe: Recipe, stage: Stage, name: str) -> dict:
    """What config.json beside weights.safetensors says: enough to build the model again without the recipe."""
    part = {"tokenizer": to_json(stage.tokenizer)} if stage.tokenizer else {"model": to_json(recipe.model)}
    return {"recipe": recipe.name, "stage": name, "recipe_hash": stage_hash(recipe, stage), **part}


def _teacher(stage: Stage, run_dir: Path) -> PixelTeacher | ClipTeacher | EncoderTeacher:
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
    encoder = MultiwayEncoder(MultiwayConfig(**_fields(config["model"])), experts=("vision",))
    encoder.load_state_dict({name: state[f"encoder.{name}"] for name in encoder.state_dict()})
    return EncoderTeacher(encoder, stage.tokenizer.grid)


def _fields(config: dict) -> dict:
    """The fields of a config.json's section, without the name of its class."""
    return {key: value for key, value in config.items() if key != "class"}


def _patch_size(recipe: Recipe, stage: Stage) -> int:
    return stage.tokenizer.patch_size if stage.tokenizer else recipe.model.patch_size


def _shorten(names: list[str]) -> str:
    """Parameter names by their first three parts, so that a log line stays a line."""
    groups = sorted({".".join(name.split(".")[:3]) for name in names})
    more = f" and {len(groups) - 6} more" if len(groups) > 6 else ""
    return ", ".join(groups[:6]) + more
