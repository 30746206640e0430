"""The run in a stage's directory: its settings, whether it is finished, its lock, and digests of what it reads."""

from __future__ import annotations

import hashlib
import logging
import secrets
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.checkpoint.weights import CONFIG, WEIGHTS, mend_config, weights_header
from pretrain.config import Recipe, Stage, to_json
from pretrain.distributed import gather_objects, rank, refuse_together
from pretrain.files import WRITING, sha256_of, sweep, write_json
from pretrain.json_files import read_object
from pretrain.lock import Lock
from pretrain.rollbacks import ROLLBACKS
from pretrain.run.identity import differences, hash_of, identity_of
from pretrain.run.inputs import text_tokenizer
from pretrain.run.stored_weights import input_digest
from pretrain.settings import fill_variables

log = logging.getLogger("pretrain")

RECIPE = "recipe.json"
SHOWN = 4  # changed settings that an error names
SEEN_S = 60.0  # how long an NFS client may remember that a name did not exist


def run_identity(directory: Path, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The identity of the run in `directory`: the one that was noted at its first start, else that of a run which
    starts now. Raises ValueError if the directory holds a run with other settings, naming those that differ. Settings
    that are only about logging or saving may change between two starts."""
    if (noted := noted_identity(directory)) is None:
        return identity_of(recipe, stage)
    if changed := differences(noted, recipe, stage):
        named = ", ".join(f"{key}={then} (now {now})" for key, (then, now) in list(changed.items())[:SHOWN])
        more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise ValueError(
            f"{directory} holds a run with other settings: {named}{more}; start it with its own settings, or take "
            "another --run-dir (with --continue-from, for more steps or other rates, or init_from=, to go on from its "
            "weights)"
        )
    return noted


def noted_identity(directory: Path) -> dict[str, Any] | None:
    """The identity of a run that has saved something, or has gone back; None if the directory holds no such run."""
    noted = read_recipe(directory).get("identity")
    begun = any((directory / name).exists() for name in (WEIGHTS, ROLLBACKS))
    begun = begun or any((directory / "checkpoints").glob("step_*"))
    return noted if isinstance(noted, dict) and begun else None


def finished(directory: Path, identity: dict[str, Any]) -> bool:
    """As `is_finished`; rank 0 also writes the config.json beside the final weights if a kill prevented that."""
    if not is_finished(directory, identity):
        return False
    if rank() == 0 and mend_config(directory / WEIGHTS):
        log.info("%s: wrote %s, as a kill had prevented it", directory.name, directory / CONFIG)
    return True


def is_finished(directory: Path, identity: dict[str, Any]) -> bool:
    """Whether the directory holds the final weights of the run with this identity; its checkpoints may be gone by then.
    Raises ValueError for final weights of another run."""
    path = directory / WEIGHTS
    if not path.exists():
        return False
    made = weights_header(path).get("config", {})
    if made.get("recipe_hash") != hash_of(identity):
        raise ValueError(f"{path} is of another run than this one; take another --run-dir, or move it away")
    return True


def take_directory(directory: Path) -> Lock | None:
    """Locks the stage's directory for this job, before anything is written -> the lock on rank 0, None elsewhere. Every
    rank must call it. Raises ValueError on all of them if another job writes there, if a rank cannot write, or if a
    rank sees another directory than rank 0."""
    lock, problem = None, None
    if rank() == 0:
        try:
            lock = Lock(directory)
            sweep(directory)
        except ValueError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{directory} cannot be written ({error.strerror}); make it writable, or take another --run-dir"
    refuse_together(problem)
    _check_shared(directory)
    return lock


def _check_shared(directory: Path) -> None:
    """Tries what a save will do: rank 0 makes a directory, and every rank writes a file into it. ValueError on every
    rank if that fails."""
    place = directory / gather_objects(f".start_{secrets.token_hex(4)}{WRITING}")[0]
    try:
        refuse_together(_try_writing(place.mkdir, directory) if rank() == 0 else None)
        refuse_together(_try_writing(lambda: (place / f"rank{rank():05d}").write_text("written"), directory))
    finally:
        if rank() == 0:
            shutil.rmtree(place, ignore_errors=True)


def _try_writing(write: Callable[[], object], directory: Path) -> str | None:
    """Calls `write` -> what is wrong with the directory for this rank, or None."""
    here, end = f"rank {rank()} on {socket.gethostname()}", time.monotonic() + SEEN_S
    while True:
        try:
            write()
            return None
        except FileNotFoundError:
            if time.monotonic() < end:
                time.sleep(0.2)
                continue
            return (
                f"{directory} is not the same directory for {here} as for rank 0; take a --run-dir on a file system "
                "that all nodes share"
            )
        except OSError as error:
            return f"{directory} cannot be written by {here} ({error.strerror}); make it writable for every node"


def note_recipe(directory: Path, recipe: Recipe, identity: dict[str, Any], command: dict[str, Any]) -> None:
    """Writes recipe.json: for people, for `pretrain.evaluate`, and for the next start of the same run."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RECIPE, to_json(recipe) | {"command": command, "identity": identity})


def read_recipe(directory: Path) -> dict[str, Any]:
    """The content of a directory's recipe.json; {} if it is missing or unreadable."""
    return read_json(directory / RECIPE)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if it is missing or unreadable."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def inputs_digest(shards: dict[str, str], others: list[str]) -> str:
    """One text that names the content of everything a run reads: `shards`, {kind: digest}, and `other_inputs`."""
    return " ".join([*(f"{kind}:{digest}" for kind, digest in shards.items()), *others])


def other_inputs(recipe: Recipe, stage: Stage, run_dir: Path) -> list[str]:
    """The digests of the text tokenizer, of further files that sources read, and of the weights that a run starts or
    learns from: init_from, the visual tokenizer, teachers. ValueError for one that does not exist."""
    parts = []
    for kind, source in stage.mix.items():
        for name in getattr(source, "files", ()):
            path = Path(fill_variables(name, f"mix.{kind}")).expanduser()
            if not path.is_file():
                raise ValueError(f"mix.{kind} reads {path}, which does not exist; make it first")
            parts.append(f"{kind}:{sha256_of(path)[:16]}")
    if (text := text_tokenizer(recipe, stage)) is not None:
        parts.append("text:" + hashlib.sha256(text.path.read_bytes()).hexdigest()[:16])
    names = {"init_from": stage.init_from, "visual_tokenizer": stage.visual_tokenizer, **stage.reads}
    return parts + [f"{knob}:{input_digest(name, run_dir, knob)}" for knob, name in names.items() if name is not None]
