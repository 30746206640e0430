"""Reads a Hugging Face directory that hub/write.py wrote, as weights of ours."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from pretrain.checkpoint.weights import read_weights
from pretrain.contracts import State
from pretrain.hub.write import HEADS, MODEL_TYPE, WEIGHTS
from pretrain.json_files import read_object
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.run.stored_weights import model_in

CONFIG = "config.json"


def is_directory(path: Path) -> bool:
    """Whether a directory has the files of one that hub/write.py writes."""
    return (path / WEIGHTS).is_file() and (path / CONFIG).is_file()


def is_ours(path: Path) -> bool:
    """Whether the directory's configuration says that it is one of ours."""
    return (path / CONFIG).is_file() and read_object(path / CONFIG).get("model_type") == MODEL_TYPE


def read_directory(path: Path) -> tuple[State, MultiwayConfig, dict[str, Any]]:
    """-> (tensors by our names, the model's configuration, the rest of the config that we store with weights). The code
    in the directory is not executed. ValueError for a directory of another kind."""
    if not is_directory(path):
        raise ValueError(f"{path} has no {WEIGHTS} with a {CONFIG}; give a directory that export to-hf wrote")
    content = read_object(path / CONFIG)
    if content.get("model_type") != MODEL_TYPE:
        kind = str(content.get("model_type"))[:40]
        raise ValueError(f"{path} holds a {kind}, not a {MODEL_TYPE}; give a directory that export to-hf wrote")
    names = [field.name for field in fields(MultiwayConfig)]
    model = model_in({"model": {name: content[name] for name in names if name in content}}, path)
    assert isinstance(model, MultiwayConfig)
    state, _ = read_weights(path / WEIGHTS)
    ours = {theirs: mine for mine, theirs in HEADS.items()}
    tensors = {ours.get(name, name): value for name, value in state.items()}
    return tensors, model, {"look": {"evaluation": str(content.get("evaluation", "squash"))}}
