"""What a stage's directory says of the run in it: its settings, whether it is finished, and what it was made from."""

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
SEEN_S = 60.0  # an NFS client may remember for so long that a name was not there


def run_identity(directory: Path, recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The identity of the run in `directory`: what was noted at its first start, else that of a run which starts now.
    Raises ValueError when the directory holds a run with other settings, naming those that differ. What is only about
    logging or saving may change between two starts."""
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
    """What was noted of a run that has saved something, or has gone back; None where there is none."""
    noted = read_recipe(directory).get("identity")
    begun = any((directory / name).exists() for name in (WEIGHTS, ROLLBACKS))
    begun = begun or any((directory / "checkpoints").glob("step_*"))
    return noted if isinstance(noted, dict) and begun else None


def finished(directory: Path, identity: dict[str, Any]) -> bool:
    """`is_finished`; what a kill left undone behind the final weights rank 0 does now."""
    if not is_finished(directory, identity):
        return False
    if rank() == 0 and mend_config(directory / WEIGHTS):
        log.info("%s: wrote %s again, which a kill had prevented", directory.name, directory / CONFIG)
    return True


def is_finished(directory: Path, identity: dict[str, Any]) -> bool:
    """Whether the directory holds the final weights of this very run; its checkpoints need not be there any more.
    Raises ValueError for final weights of another run."""
    path = directory / WEIGHTS
    if not path.exists():
        return False
    made = weights_header(path).get("config", {})
    if made.get("recipe_hash") != hash_of(identity):
        raise ValueError(f"{path} is of another run than this one; take another --run-dir, or move it away")
    return True


def take_directory(directory: Path) -> Lock | None:
    """Makes the stage's directory this job's own, before anything is written; the lock is rank 0's. Every rank calls
    it. Raises ValueError on all of them when another job writes there, or when one rank cannot write or sees another
    directory than rank 0."""
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
    """As a save does it: rank 0 makes a directory, and every rank writes a file into it."""
    place = directory / gather_objects(f".start_{secrets.token_hex(4)}{WRITING}")[0]
    try:
        refuse_together(_try_writing(place.mkdir, directory) if rank() == 0 else None)
        refuse_together(_try_writing(lambda: (place / f"rank{rank():05d}").write_text("written"), directory))
    finally:
        if rank() == 0:
            shutil.rmtree(place, ignore_errors=True)


def _try_writing(write: Callable[[], object], directory: Path) -> str | None:
    """What is wrong with the directory for this rank."""
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
    """Write recipe.json: for readers, for `pretrain.evaluate`, and for the next start of the same run."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / RECIPE, to_json(recipe) | {"command": command, "identity": identity})


def read_recipe(directory: Path) -> dict[str, Any]:
    """What `note_recipe` wrote; {} where there is nothing readable."""
    return read_json(directory / RECIPE)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is nothing readable."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def inputs_digest(shards: dict[str, str], others: list[str]) -> str:
    """Names everything that a run reads: `shards`, kind -> digest, and what `other_inputs` gives."""
    return " ".join([*(f"{kind}:{digest}" for kind, digest in shards.items()), *others])


def other_inputs(recipe: Recipe, stage: Stage, run_dir: Path) -> list[str]:
    """The digests of the text tokenizer, of further files that sources read, of the weights that a run starts from, the
    visual tokenizer and its teacher. ValueError for what is not there."""
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
