"""Trained weights as a model that embeds pictures and texts: what `pretrain.load` returns."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from pretrain.batch import PAD, Layout, make_batch
from pretrain.checkpoint.weights import WEIGHTS, read_weights
from pretrain.contracts import State
from pretrain.data.shards.reader import BadSample
from pretrain.data.text_tokenizer import TOKENIZER, TextTokenizer
from pretrain.data.transforms import ImageTransform
from pretrain.export import from_released, read_tensors
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.contrastive import Contrastive
from pretrain.run.directory import read_recipe
from pretrain.run.stored_weights import model_in
from pretrain.settings import fill_variables
from pretrain.tasks.pretrain import PretrainTask

Picture = str | os.PathLike | bytes | np.ndarray | Image.Image
T = TypeVar("T")
DTYPES = (torch.float32, torch.bfloat16)


class Pretrained:
    """An encoder with its contrastive head, if it has one. Made by `load`; `model` is its configuration, `task` the
    module, and `transform` how a picture is looked at. Results lie on the host, in float32."""

    def __init__(
        self,
        task: PretrainTask,
        model: MultiwayConfig,
        transform: ImageTransform,
        text: TextTokenizer | None,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.task, self.model, self.transform, self.text = task.to(device).eval(), model, transform, text
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def embed_images(self, pictures: Iterable[Picture], batch: int = 64) -> Tensor:
        """Pictures (paths, encoded bytes, PIL pictures, or uint8 arrays [H, W, 3] or [H, W]) -> unit vectors [N, E] of
        the dual encoder. ValueError for weights without a contrastive head; BadSample, which is one, for a picture that
        cannot be used, with its number."""
        parts = [self.embed_looks(pixels) for pixels in self._looks(pictures, batch)]
        return torch.cat(parts) if parts else torch.zeros(0, self.head.width)

    @torch.no_grad()
    def embed_looks(self, pixels: Tensor) -> Tensor:
        """What `look` made of pictures, uint8 [N, 3, S, S] -> unit vectors [N, E], in one pass."""
        layout = Layout(images=len(pixels), patches=self._patches)
        return self.head.embed_images(self._encode(layout, images=pixels)).cpu()

    def look(self, picture: Picture) -> Tensor:
        """A picture as the encoder sees it: uint8 [3, S, S], S the model's image_size. BadSample, ValueError. Any
        number of threads may call it."""
        return torch.from_numpy(self.transform(encoded_picture(picture)))

    @torch.no_grad()
    def embed_texts(self, texts: Iterable[str], batch: int = 64) -> Tensor:
        """-> unit vectors [N, E] of the dual encoder. A text is cut at the model's `max_text_len`. ValueError for
        weights without a contrastive head, or without a text tokenizer."""
        head, parts = self.head, []
        for some in _batches(texts, batch):
            tokens = self._tokens(some)
            layout = Layout(texts=len(tokens), text_len=tokens.shape[1])
            parts.append(head.embed_texts(self._encode(layout, text_tokens=tokens)).cpu())
        return torch.cat(parts) if parts else torch.zeros(0, head.width)

    def similarity(self, pictures: Iterable[Picture], texts: Iterable[str], batch: int = 64) -> Tensor:
        """-> cosines [N, M] of every picture with every text."""
        return self.embed_images(pictures, batch) @ self.embed_texts(texts, batch).T

    @torch.no_grad()
    def embed_pairs(self, pictures: Sequence[Picture], texts: Sequence[str], batch: int = 64) -> Tensor:
        """Each picture together with its own text, by the fusion encoder -> its class row after the final norm, [N,
        D]. ValueError where there are not as many texts as pictures."""
        if len(pictures) != len(texts):
            raise ValueError(f"embed_pairs got {len(pictures)} pictures and {len(texts)} texts; give one text for each")
        parts = []
        for pixels, some in zip(self._looks(pictures, batch), _batches(texts, batch), strict=True):
            tokens = self._tokens(some)
            layout = Layout(pairs=len(tokens), patches=self._patches, pair_len=tokens.shape[1])
            encoded = self._encode(layout, images=pixels, pair_tokens=tokens)
            parts.append(encoded.first.pair_images.float().cpu())
        return torch.cat(parts) if parts else torch.zeros(0, self.model.dim)

    @property
    def _patches(self) -> int:
        return (self.model.image_size // self.model.patch_size) ** 2

    @property
    def head(self) -> Any:
        """Of the objective contrastive. ValueError for weights that have none."""
        if "contrastive" not in self.task.objectives:
            raise ValueError(
                "these weights have no contrastive head, so pictures and texts have no vectors that can be compared; "
                "load a retrieval stage, or use embed_pairs"
            )
        return self.task.objectives["contrastive"]

    def _encode(self, layout: Layout, **parts: Tensor) -> Any:
        batch = make_batch(layout, **parts).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.task.encoder(batch)

    def _looks(self, pictures: Iterable[Picture], batch: int) -> Iterator[Tensor]:
        for number, some in enumerate(_batches(pictures, batch)):
            looks = []
            for place, picture in enumerate(some):
                try:
                    looks.append(self.look(picture))
                except BadSample as error:
                    raise BadSample(f"picture {number * batch + place}: {error}") from None
            yield torch.stack(looks)

    def _tokens(self, texts: Sequence[str]) -> Tensor:
        if self.text is None:
            raise ValueError("these weights came without a text tokenizer; give load(..., text_tokenizer='text.model')")
        ids = [self.text.encode(text, self.model.max_text_len) for text in texts]
        tokens = torch.full((len(ids), max(map(len, ids))), PAD)
        for row, own in zip(tokens, ids, strict=True):
            row[: len(own)] = torch.tensor(own)
        return tokens


def load(
    weights: str | os.PathLike,
    *,
    text_tokenizer: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Pretrained:
    """The directory of a trained stage, a weights.safetensors, or a released BEiT-3 file (.pth with unilm's names) ->
    a model to use; no recipe is needed, and nothing in the files is executed.

    `text_tokenizer`: a SentencePiece model, for weights that came without theirs. `device`: a GPU where there is one.
    `dtype`: float32, or bfloat16 (autocast). ValueError, in one sentence, for whatever cannot be used.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not one of {', '.join(map(str, DTYPES))}; use one of these")
    path = Path(weights).expanduser()
    if not path.exists():
        raise ValueError(f"{path} does not exist; give a stage's directory, a weights.safetensors or a released .pth")
    state, model, config = _read(path)
    experts = _experts(state)
    task = PretrainTask(model, experts, _objectives(state, model))
    _fill(task, state, path)
    directory = path if path.is_dir() else path.parent
    text = Path(text_tokenizer) if text_tokenizer is not None else _text_tokenizer(directory)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = TextTokenizer(text) if text is not None else None
    if tokenizer is not None and tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"{text} has {tokenizer.vocab_size} ids and the model of {path} a vocabulary of {model.vocab_size}; give "
            "text_tokenizer= the one that it was trained with"
        )
    return Pretrained(task, model, _transform(config, model), tokenizer, where, dtype)


def encoded_picture(picture: Picture) -> bytes:
    """The bytes of a picture, for the loader's own decoder and its limits. ValueError for what is none."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Path(picture).expanduser().read_bytes()
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
            raise ValueError(f"an array {picture.dtype} {picture.shape} is no picture; give uint8 [H, W, 3] or [H, W]")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"{type(picture).__name__} is no picture; give a path, bytes, a PIL picture or a uint8 array")
    upright, data = ImageOps.exif_transpose(picture), io.BytesIO()
    keeps = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # what a PNG has; others become RGB
    (upright if upright.mode in keeps else upright.convert("RGB")).save(data, "PNG", compress_level=0)
    return data.getvalue()


def _read(path: Path) -> tuple[State, MultiwayConfig, dict[str, Any]]:
    if path.is_dir() or path.suffix == ".safetensors":
        if path.is_dir() and not (path / WEIGHTS).is_file():
            raise ValueError(f"{path} has no {WEIGHTS}; give the directory of a finished stage")
        state, config = read_weights(path)
        if config:
            model = model_in(config, path)
            if not isinstance(model, MultiwayConfig):
                raise ValueError(f"{path} has a {type(model).__name__}, not an encoder; give the weights of an encoder")
            return state, model, config
    state, model = from_released(read_tensors(path / WEIGHTS if path.is_dir() else path))
    return state, model, {}


def _experts(state: State) -> tuple[str, ...]:
    """What the weights have parts for."""
    parts = {"vision": "encoder.vision_embed.", "language": "encoder.text_embed.", "fusion": ".experts.fusion."}
    return tuple(name for name, part in parts.items() if any(part in key for key in state))


def _objectives(state: State, model: MultiwayConfig) -> list[Contrastive]:
    head = state.get("objectives.contrastive.vision.weight")
    return [] if head is None else [Contrastive(None if len(head) == model.dim else len(head))]


def _fill(task: PretrainTask, state: State, path: Path) -> None:
    wanted = task.state_dict()
    for name, value in wanted.items():
        if name not in state or state[name].shape != value.shape:
            has = f"has {tuple(state[name].shape)} for" if name in state else "lacks"
            raise ValueError(f"{path} {has} {name}, which is {tuple(value.shape)} in its model; it is incomplete")
    task.load_state_dict({name: state[name] for name in wanted})


def _text_tokenizer(directory: Path) -> Path | None:
    """Beside the weights, else where the recipe that trained them has it."""
    if (beside := directory / TOKENIZER).is_file():
        return beside
    noted = read_recipe(directory).get("text_tokenizer")
    if not isinstance(noted, str):
        return None
    try:
        path = Path(fill_variables(noted, "text_tokenizer")).expanduser()
    except ValueError:  # a variable that is not set here
        return None
    return path if path.is_file() else None


def _transform(config: dict[str, Any], model: MultiwayConfig) -> ImageTransform:
    """As the stage's own evaluation looks at pictures; released weights squash them."""
    look = config.get("look")
    evaluation = look.get("evaluation", "squash") if isinstance(look, dict) else "squash"
    return ImageTransform(size=model.image_size, train=False, evaluation=str(evaluation))


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    if size < 1:
        raise ValueError(f"batch={size} is below 1; use 64")
    some: list[T] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
