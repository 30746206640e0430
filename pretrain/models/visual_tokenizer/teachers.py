"""Teachers of the visual tokenizer: they say what its codes must predict for each patch.

A recipe names a teacher by one of the small configs `Pixels`, `Clip` and `Encoder`. Their `build` returns a plain
object, called with images (uint8, or float in [-1, 1]) [N, 3, H, W] -> fp32 [N, grid * grid, dim], with `dim` and
`distill` for the tokenizer's config. It is frozen and not a module, so that nothing of it is trained or saved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch, Layout, make_batch
from pretrain.json_files import read_object, typed
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig, centred, to_patches
from pretrain.rows import sent
from pretrain.settings import fill_variables
from pretrain.tensors import check_finite, load_tensors

# What OpenAI trained CLIP with; a directory's preprocessor_config.json takes precedence.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# (name of weights, knob that names them) -> (their tensors, the model that they belong to)
ReadWeights = Callable[[str, str], tuple[dict[str, Tensor], Any]]


class Teacher(Protocol):
    """What the configs build; see the top of this file."""

    distill: str  # the loss, as VQKDConfig.distill
    dim: int  # width of the target for one patch

    def __call__(self, images: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Pixels:
    """See PixelTeacher: the colours of each patch, averaged over `cells` x `cells` squares."""

    cells: int = 4

    def build(self, tokenizer: VQKDConfig, read: ReadWeights) -> PixelTeacher:
        return PixelTeacher(tokenizer.patch_size, self.cells)

    def reads(self) -> dict[str, str]:
        return {}


@dataclass(frozen=True)
class Clip:
    """A Hugging Face CLIP in `directory` ($VARIABLES are expanded), as BEiT v2's teacher; see ClipTeacher."""

    directory: str

    def build(self, tokenizer: VQKDConfig, read: ReadWeights) -> ClipTeacher:
        return ClipTeacher(Path(fill_variables(self.directory, "task.teacher.directory")).expanduser(), tokenizer.grid)

    def reads(self) -> dict[str, str]:
        return {"teacher": self.directory}


@dataclass(frozen=True)
class Encoder:
    """An encoder of ours with a vision expert; `weights`: a stage of this run directory, or a weights.safetensors."""

    weights: str

    def build(self, tokenizer: VQKDConfig, read: ReadWeights) -> EncoderTeacher:
        state, model = read(self.weights, "teacher")
        prefix = "encoder."
        if f"{prefix}vision_embed.proj.weight" not in state:
            raise ValueError(
                f"task.teacher.weights={self.weights} holds no encoder with vision; give a stage that has one, or "
                "teacher=Clip(DIR)"
            )
        encoder = model.build(("vision",))
        own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        load_tensors(encoder, own, f"task.teacher.weights={self.weights}")
        return EncoderTeacher(encoder, model, tokenizer.grid)

    def reads(self) -> dict[str, str]:
        return {"teacher": self.weights}


class PixelTeacher:
    """The colours of each patch, averaged over `cells` x `cells` squares: a teacher that needs no weights.

    Its loss is the squared error. A cosine, which suits features, would not see brightness: a dark grey
    patch has the direction of a black one, and a mid-grey one has none. All patches have one fixed scale, which gives
    colours about unit variance: the loss then begins near 1, as a cosine's does, and `beta` keeps its meaning. MAE's
    normalisation of each patch would wipe out the colour of a plain one.
    """

    distill = "mse"
    SCALE = 2.0  # natural pictures in [-1, 1] have a standard deviation of about 0.5

    def __init__(self, patch_size: int, cells: int = 4):
        if cells < 1 or patch_size % cells:
            raise ValueError(
                f"cells={cells} does not divide patch_size={patch_size}, so a patch has no {cells} x {cells} equal "
                f"squares; use {max(c for c in range(1, min(max(cells, 1), patch_size) + 1) if patch_size % c == 0)}"
            )
        self.patch_size, self.cells, self.dim = patch_size, cells, 3 * cells**2

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        squares = F.avg_pool2d(centred(images).float(), self.patch_size // self.cells)
        return to_patches(squares, self.cells) * self.SCALE

    def picture(self, targets: Tensor) -> Tensor:
        """Targets, or what `VQKD.decode_codes` predicts, [N, P, dim] -> uint8 [N, 3, grid * cells, grid * cells]."""
        N, P, _ = targets.shape
        grid, cells = round(P**0.5), self.cells
        squares = targets.float().view(N, grid, grid, 3, cells, cells).permute(0, 3, 1, 4, 2, 5)
        pixels = squares.reshape(N, 3, grid * cells, grid * cells) / self.SCALE
        return ((pixels + 1) * 127.5).round().clamp(0, 255).byte()


class ClipTeacher:
    """A Hugging Face CLIP's patch rows in the space it shares with text (BEiT v2's teacher is CLIP ViT-B/16).

    Reads a local directory: config.json, *.safetensors, and preprocessor_config.json if it exists. Pictures are resized
    to CLIP's own size, and its patches brought onto the tokenizer's grid where the two differ. Raises ValueError for a
    directory that holds no such model."""

    distill = "cosine"

    def __init__(self, directory: str | Path, grid: int):
        self.grid = grid
        self._model = _load_clip(Path(directory))
        self._mean, self._std = _clip_statistics(Path(directory))
        self._size = self._model.config.image_size
        self.dim: int = self._model.config.projection_dim

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        model = self._model.to(images.device)
        mean, std = (sent(torch.tensor(v).view(3, 1, 1), images.device) for v in (self._mean, self._std))
        pixels = (resize(centred(images).float(), self._size) / 2 + 0.5).clamp(0, 1)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            rows = model.vision_model(pixel_values=(pixels - mean) / std).last_hidden_state[:, 1:]
            # transformers projects the class row alone; BEiT v2 gives every patch the same norm and projection.
            rows = model.visual_projection(model.vision_model.post_layernorm(rows))
        return onto_grid(rows.float(), self.grid)


class EncoderTeacher:
    """The final patch rows of one of our own encoders, from images alone, on the tokenizer's grid."""

    distill = "cosine"

    def __init__(self, encoder: nn.Module, model: Any, grid: int):
        self.grid, self.dim, self._model = grid, model.width("images"), model
        self._encoder = encoder.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        encoder, size = self._encoder.to(images.device), self._model.image_size
        if images.shape[-1] != size:
            images = resize(centred(images).float(), size).clamp(-1, 1)
        layout = Layout(images=len(images), patches=(size // self._model.patch_size) ** 2)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            rows = encoder(_alone(images, layout)).images
        return onto_grid(rows.float()[:, 1:], self.grid)


def _alone(images: Tensor, layout: Layout) -> Batch:
    """A batch of pictures, with an index that asks the device for nothing."""
    host = make_batch(layout).indexed()
    assert host.index is not None
    return make_batch(layout, images=images).with_index(host.index.map(partial(sent, device=images.device)), host)


def resize(images: Tensor, size: int) -> Tensor:
    """Square float pictures [N, 3, H, H] -> [N, 3, size, size], bicubic as in CLIP; this can overshoot their range."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)


def onto_grid(rows: Tensor, grid: int) -> Tensor:
    """Patch rows [N, g * g, D] -> [N, grid * grid, D]: means of whole patches where g is a multiple of `grid`, and else
    bilinear between the patches' centres (means of all patches that a new one touches would repeat and blur)."""
    own = round(rows.shape[1] ** 0.5)
    if own == grid:
        return rows
    square = rows.transpose(1, 2).unflatten(2, (own, own))
    if own % grid == 0:
        placed = F.adaptive_avg_pool2d(square, grid)
    else:
        placed = F.interpolate(square, size=(grid, grid), mode="bilinear", antialias=True, align_corners=False)
    return placed.flatten(2).transpose(1, 2)


def check_clip(directory: Path) -> None:
    """Raises ValueError where `directory` cannot hold a Hugging Face CLIP; reads no weights."""
    if not (directory / "config.json").is_file():
        raise ValueError(
            f"teacher={directory} holds no config.json; download a CLIP there first: "
            f"hf download openai/clip-vit-base-patch16 --local-dir {directory}"
        )
    if not any(directory.glob("*.safetensors")):
        raise ValueError(
            f"teacher={directory} holds no *.safetensors, and pickled weights are not read; convert them once: "
            f"CLIPModel.from_pretrained('{directory}').save_pretrained('{directory}') of transformers does it"
        )


def _load_clip(directory: Path) -> Any:
    check_clip(directory)
    from transformers import AutoConfig, CLIPVisionModelWithProjection
    from transformers.utils import logging

    loud = logging.get_verbosity()
    logging.set_verbosity_error()  # it would report each text weight of a whole CLIP, which is not wanted here
    try:
        config: Any = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        if config.model_type == "clip":
            # The projection's width stands in a whole CLIP's config; that of its vision part may differ.
            config.vision_config.projection_dim = config.projection_dim
            config = config.vision_config
        if config.model_type != "clip_vision_model":
            raise ValueError(f"its model_type is {config.model_type}")
        model, report = CLIPVisionModelWithProjection.from_pretrained(
            directory,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
        _check_clip_tensors(directory, model)
    except Exception as error:  # transformers and safetensors raise a dozen kinds for a damaged directory
        raise ValueError(
            f"teacher={directory} cannot be read as a CLIP model ({error}); download it again, or name another"
        ) from error
    finally:
        logging.set_verbosity(loud)
    # Without this another model's directory would give a teacher of random weights and one warning.
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(
            f"teacher={directory} is no whole CLIP vision model: of its tensors {len(report['missing_keys'])} are "
            f"missing and {len(report['mismatched_keys'])} have another shape; use one such as "
            "openai/clip-vit-base-patch16"
        )
    return model.eval().requires_grad_(False)


def _check_clip_tensors(directory: Path, model: nn.Module) -> None:
    """ValueError for stored types that would lose digits, which transformers casts silently, and for NaN."""
    from safetensors import safe_open

    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  it is no mapping
                kind = file.get_slice(name).get_dtype()
                if kind not in ("F32", "F16", "BF16") and not name.endswith("position_ids"):
                    raise ValueError(f"{path.name}: {name} holds {kind} but must hold F32, F16 or BF16")
    for name, value in model.named_parameters():
        check_finite(directory, name, value)


def _clip_statistics(directory: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and deviation by which the directory's CLIP normalises pictures."""
    path = directory / "preprocessor_config.json"
    if not path.is_file():
        return CLIP_MEAN, CLIP_STD
    try:
        settings = read_object(path)
        mean, std = (tuple(map(float, typed(settings, key, list))) for key in ("image_mean", "image_std"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} has no readable image_mean and image_std ({error}); download it again") from error
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"{path}: image_mean={mean}, image_std={std} are not three colours; download it again")
    return mean, std
