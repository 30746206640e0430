"""Weights in files (a stage's, or released ones) -> the task that they belong to, without a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.checkpoint.save import read_trained
from pretrain.checkpoint.weights import WEIGHTS
from pretrain.contracts import Objective, State
from pretrain.data.text_tokenizer import BESIDE_WEIGHTS
from pretrain.hub.read import is_directory, read_directory
from pretrain.models.fusion.co_attention import CoAttention
from pretrain.models.fusion.late import LateFusion
from pretrain.models.fusion.several_depths import SeveralDepths
from pretrain.models.fusion.single_stream import SingleStream
from pretrain.models.fusion.text_queries_image import TextQueriesImage
from pretrain.models.towers.dual import DualTowers
from pretrain.objectives.answering import Answering
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.classification import ImageClassification
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.entailment import Entailment
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.objectives.reasoning import Reasoning
from pretrain.parallel.state import dense_shape, fill, named_state
from pretrain.released_weights import from_released, read_tensors
from pretrain.run.directory import read_recipe
from pretrain.run.stored_weights import model_in
from pretrain.settings import fill_variables
from pretrain.tasks.pretrain import PretrainTask

# The encoders that not every command can use; Multiway's and BLIP's every one can.
FURTHER = (DualTowers, LateFusion, TextQueriesImage, SeveralDepths, CoAttention, SingleStream)


def read_stored(path: Path, further: tuple[type, ...] = ()) -> tuple[State, Any, dict[str, Any]]:
    """-> (tensors by our names, the model's configuration, the config that is stored with the weights). `further`:
    those of FURTHER that the caller can use. ValueError for weights that are no encoder's, or another's."""
    if path.is_dir() and not (path / WEIGHTS).is_file() and is_directory(path):
        return read_directory(path)
    if path.is_dir() or path.suffix == ".safetensors":
        if path.is_dir() and not (path / WEIGHTS).is_file():
            raise ValueError(f"{path} has no {WEIGHTS}; give the directory of a finished stage")
        state, config = read_trained(path)
        if config:
            model = model_in(config, path, FURTHER)
            if not model.encodes or (type(model) in FURTHER and type(model) not in further):
                raise ValueError(f"{path} has a {type(model).__name__}, not an encoder; give the weights of an encoder")
            return state, model, config
    state, model = from_released(read_tensors(path / WEIGHTS if path.is_dir() else path), where=path)
    return state, model, {}


def experts_in(state: State) -> tuple[str, ...]:
    """The experts (vision, language, fusion) that the weights have parts for."""
    parts = {"vision": ".vision_embed.", "language": ".text_embed.", "fusion": ".experts.fusion."}
    return tuple(name for name, part in parts.items() if any(part in key for key in state))


def objectives_in(state: State, model: Any) -> list[Objective]:
    """The objectives whose heads the weights have and that are of use without training."""
    objectives: list[Objective] = []
    if "objectives.contrastive.logit_scale" in state:
        head = state.get("objectives.contrastive.vision.weight")
        loss = "sigmoid" if "objectives.contrastive.logit_bias" in state else "softmax"
        width = None if head is None or len(head) == model.width("images") else len(head)
        bias = "objectives.contrastive.vision.bias" in state
        objectives.append(Contrastive(width, loss=loss, project=head is not None, projection_bias=bias))
    if "objectives.matching.match.weight" in state:
        objectives.append(Matching("global" if objectives else "random"))  # its partners matter in training alone
    if "objectives.masked.text.bias" in state:
        tied = "objectives.masked.text.weight" not in state  # a pipeline writes it once, under its first name
        own: dict[str, Any] = {"tied_text_head": tied, "transform": "objectives.masked.transform.0.weight" in state}
        objectives.append(MaskedData(image_ratio=0.0, pair_image_ratio=0.0, **own))
    if "objectives.captioning.words.bias" in state:
        table, transform = (f"objectives.captioning.{name}" in state for name in ("words.weight", "transform.0.weight"))
        objectives.append(Captioning(tied_text_head=not table, transform=transform))
    if (last := state.get("objectives.classification.classes.weight")) is not None:
        objectives.append(ImageClassification(len(last)))
    if (last := state.get("objectives.answering.answer.3.weight")) is not None:
        objectives.append(Answering(len(last)))
    if (last := state.get("objectives.entailment.answer.3.weight")) is not None:
        objectives.append(Entailment(len(last)))
    if "objectives.reasoning.norm.weight" in state:
        objectives.append(Reasoning())
    return objectives


def build_stored(state: State, model: Any, path: Path) -> PretrainTask:
    """The task that the tensors of `path` belong to, filled with them. ValueError as from `fill_task`."""
    task = PretrainTask(model, experts_in(state), objectives_in(state, model))
    fill_task(task, state, path)
    return task


def fill_task(task: PretrainTask, state: State, path: Path) -> None:
    """Copies every tensor of the task from the state. ValueError, naming `path`, where one is missing or has another
    shape."""
    for name, value in named_state(task).items():
        if value is getattr(task.encoder, "token_table", None) and name not in state and name.startswith("objectives."):
            continue  # a tied head: the encoder's table, which has a name of its own
        shape = dense_shape(value)
        if name not in state or state[name].shape != shape:
            has = f"has {tuple(state[name].shape)} for" if name in state else "lacks"
            raise ValueError(f"{path} {has} {name}, which is {shape} in its model; it is incomplete")
        fill(value, state[name])


def stored_tokenizer(directory: Path, given: Path | None = None) -> Path | None:
    """The text tokenizer's file: the one that the user gave, else the one beside the weights, else the one that the
    recipe which trained them names; None where there is none. ValueError where the given one differs from the one
    beside the weights: its words would have other ids."""
    beside = next((directory / name for name in BESIDE_WEIGHTS if (directory / name).is_file()), None)
    if given is not None:
        if beside is not None and given.is_file() and given.read_bytes() != beside.read_bytes():
            raise ValueError(f"{given} is not the text tokenizer that the weights came with, {beside}; leave it out")
        return given
    if beside is not None:
        return beside
    noted = read_recipe(directory).get("text_tokenizer")
    if not isinstance(noted, str):
        return None
    try:
        path = Path(fill_variables(noted, "text_tokenizer")).expanduser()
    except ValueError:  # a variable that is not set here
        return None
    return path if path.is_file() else None
