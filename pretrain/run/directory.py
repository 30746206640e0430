"""What a stage's directory says of the run in it: its settings, whether it is finished, and what it was made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pretrain.checkpoint.weights import WEIGHTS, weights_digest, weights_header
from pretrain.config import Recipe, Stage, identity_of, stage_hash, to_json
from pretrain.files import write_json
from pretrain.run.build import text_tokenizer
from pretrain.run.image_targets import weights_path

RECIPE = "recipe.json"
SHOWN = 4  # changed settings that an error names


def check_same_settings(directory: Path, recipe: Recipe, stage: Stage) -> None:
    """Raises ValueError when the directory holds a run with other settings, naming those that differ. What is only
    about logging or saving may change between two starts."""
    noted = read_recipe(directory).get("identity")
    begun = (directory / WEIGHTS).exists() or any((directory / "checkpoints").glob("step_*"))
    if noted is None or not begun:
        return
    now = _flat(json.loads(json.dumps(identity_of(recipe, stage))))
    before = _flat(noted)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        named = ", ".join(f"{key}={before.get(key)} (now {now.get(key)})" for key in changed[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ValueError(
            f"{directory} holds a run with other settings: {named}{more}; start it with its own settings, or take "
            "another --run-dir (and init_from=, to go on from its weights)"
        )


def finished(directory: Path, recipe: Recipe, stage: Stage) -> bool:
    """Whether the directory holds the final weights of this very run; its checkpoints need not be there any more.
    Raises ValueError for final weights of another run."""
    path = directory / WEIGHTS
    if not path.exists():
        return False
    made = weights_header(path).get("config", {})
    if made.get("recipe_hash") != stage_hash(recipe, stage):
        raise ValueError(f"{path} is of another run than this one; take another --run-dir, or move it away")
    return True


def note_recipe(directory: Path, recipe: Recipe, stage: Stage, command: dict[str, Any]) -> None:
    """Write recipe.json: for readers, for `pretrain.evaluate`, and for the next start of the same run."""
    directory.mkdir(parents=True, exist_ok=True)
    content = to_json(recipe) | {"command": command, "identity": identity_of(recipe, stage)}
    write_json(directory / RECIPE, content)


def read_recipe(directory: Path) -> dict[str, Any]:
    """What `note_recipe` wrote; {} where there is nothing readable."""
    return read_json(directory / RECIPE)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is nothing readable."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def inputs_digest(recipe: Recipe, stage: Stage, run_dir: Path, shards: dict[str, str]) -> str:
    """Names everything that a run reads: shards, text tokenizer, the weights it starts from, the visual tokenizer."""
    parts = [f"{kind}:{digest}" for kind, digest in shards.items()]
    if (text := text_tokenizer(recipe, stage)) is not None:
        parts.append("text:" + hashlib.sha256(text.path.read_bytes()).hexdigest()[:16])
    for knob in ("init_from", "visual_tokenizer"):
        if (name := getattr(stage, knob)) is not None:
            parts.append(f"{knob}:{weights_digest(weights_path(name, run_dir, knob))[:16]}")
    return " ".join(parts)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = [(str(key), part) for key, part in value.items()]
    elif isinstance(value, list):
        items = [(str(place), part) for place, part in enumerate(value)]
    else:
        return {prefix: value}
    return {
        key: leaf for name, part in items for key, leaf in _flat(part, f"{prefix}.{name}" if prefix else name).items()
    }
