"""What a stage's directory says of the run in it: its settings, whether it is finished, and what it was made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pretrain.checkpoint.weights import WEIGHTS, weights_header
from pretrain.config import Recipe, Stage, to_json
from pretrain.files import write_json
from pretrain.run.identity import differences, hash_of, identity_of
from pretrain.run.inputs import text_tokenizer
from pretrain.run.stored_weights import input_digest

RECIPE = "recipe.json"
SHOWN = 4  # changed settings that an error names


def run_identity(directory: Path, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The identity of the run in `directory`: what was noted at its first start, else that of a run which starts now.
    Raises ValueError when the directory holds a run with other settings, naming those that differ. What is only about
    logging or saving may change between two starts."""
    noted = read_recipe(directory).get("identity")
    begun = (directory / WEIGHTS).exists() or any((directory / "checkpoints").glob("step_*"))
    if not isinstance(noted, dict) or not begun:
        return identity_of(recipe, stage)
    if changed := differences(noted, recipe, stage):
        named = ", ".join(f"{key}={then} (now {now})" for key, (then, now) in list(changed.items())[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ValueError(
            f"{directory} holds a run with other settings: {named}{more}; start it with its own settings, or take "
            "another --run-dir (and init_from=, to go on from its weights)"
        )
    return noted


def finished(directory: Path, identity: dict[str, Any]) -> bool:
    """Whether the directory holds the final weights of this very run; its checkpoints need not be there any more.
    Raises ValueError for final weights of another run."""
    path = directory / WEIGHTS
    if not path.exists():
        return False
    made = weights_header(path).get("config", {})
    if made.get("recipe_hash") != hash_of(identity):
        raise ValueError(f"{path} is of another run than this one; take another --run-dir, or move it away")
    return True


def note_recipe(directory: Path, recipe: Recipe, identity: dict[str, Any], command: dict[str, Any]) -> None:
    """Write recipe.json: for readers, for `pretrain.evaluate`, and for the next start of the same run."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RECIPE, to_json(recipe) | {"command": command, "identity": identity})


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
    """Names everything that a run reads: shards, text tokenizer, the weights it starts from, the visual tokenizer and
    its teacher."""
    parts = [f"{kind}:{digest}" for kind, digest in shards.items()]
    if (text := text_tokenizer(recipe, stage)) is not None:
        parts.append("text:" + hashlib.sha256(text.path.read_bytes()).hexdigest()[:16])
    names = {"init_from": stage.init_from, "visual_tokenizer": stage.visual_tokenizer, **stage.task.reads()}
    parts += [f"{knob}:{input_digest(name, run_dir, knob)}" for knob, name in names.items() if name is not None]
    return " ".join(parts)
