"""Weights that a recipe names: where they are, and to which model they belong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from pretrain.checkpoint.save import read_trained
from pretrain.checkpoint.weights import WEIGHTS, weights_digest
from pretrain.config import Recipe
from pretrain.contracts import Model, State
from pretrain.models.decoder.encoder_decoder import EncoderDecoder
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.settings import fill_variables

# The model's section of config.json, and its class if the section does not name one. Before 2026-11-28 a visual
# tokenizer had a section of its own.
SECTIONS = {"model": MultiwayConfig, "tokenizer": VQKDConfig}
OURS = (*SECTIONS.values(), EncoderDecoder)  # can be loaded without a recipe
# Fields that were once in the model's section: the image head's size moved to its objective, the others to the stage.
MOVED = ("image_codes", "drop_path", "activation_checkpointing")


def weights_path(name: str, run_dir: Path, knob: str) -> Path:
    """The weights.safetensors that `name`, a stage of `run_dir` or the path of a file or directory, stands for. Raises
    ValueError, naming `knob`, if it does not exist."""
    path = run_dir / name / WEIGHTS
    if path.is_file():
        return path
    plain = Path(fill_variables(name, knob)).expanduser()
    if plain.is_dir():
        plain = plain / WEIGHTS
    if plain.is_file():
        return plain
    if set(name) & {"/", "$"}:  # no stage's name
        raise ValueError(
            f"{knob}={name}: {plain} does not exist; give the path of a weights.safetensors, or of a directory that "
            "holds one"
        )
    raise ValueError(
        f"{knob}={name}: neither {path} nor {plain} exists; "
        f"run the stage {name!r} to its end first, or give the path of a weights.safetensors"
    )


def input_digest(name: str, run_dir: Path, knob: str) -> str:
    """A digest of the content of what a knob names: weights, or a directory of another program (a Hugging Face
    model)."""
    directory = Path(fill_variables(name, knob)).expanduser()
    if (run_dir / name / WEIGHTS).is_file() or not directory.is_dir() or (directory / WEIGHTS).is_file():
        return weights_digest(weights_path(name, run_dir, knob))[:16]
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def read_model(name: str, knob: str, *, run_dir: Path, recipe: Recipe) -> tuple[State, Model]:
    """The tensors of the weights that a knob names, and their model. Raises ValueError as weights_path and model_in
    do."""
    path = weights_path(name, run_dir, knob)
    state, config = read_trained(path)
    return state, model_in(config, path, classes_of(recipe))


def classes_of(recipe: Recipe) -> set[type]:
    """The classes of all models that the recipe names."""
    return {type(recipe.model), *(type(stage.model) for stage in recipe.stages.values() if stage.model is not None)}


def model_in(config: dict[str, Any], where: Path, known: Iterable[type] = ()) -> Model:
    """The model that `config`, the config.json beside weights or their header, describes. Its class must be one of OURS
    or `known`, since a name in a file must not import code. Raises ValueError, naming `where`, for any other."""
    section = next((name for name in SECTIONS if isinstance(config.get(name), dict)), None)
    if section is None:
        raise ValueError(f"{where} does not say to which model its weights belong; give weights that a stage wrote")
    values = {key: value for key, value in config[section].items() if key != "class"}
    classes = {each.__name__: each for each in (*OURS, *known)}
    name = config[section].get("class", SECTIONS[section].__name__)
    if not isinstance(name, str) or name not in classes:
        raise ValueError(f"{where} holds a {name}, which is no model of this recipe; name a recipe that uses it")
    names = {f.name for f in fields(classes[name])}
    values = {key: value for key, value in values.items() if key in names or key not in MOVED}
    if unknown := sorted(values.keys() - names):
        raise ValueError(f"{where}: {name} has no {unknown[0]}; the weights are of another version of it")
    try:
        return classes[name](**values)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:  # what a class says of wrong values
        raise ValueError(f"{where}: its config is no {name} ({error}); give weights that a stage wrote") from error
