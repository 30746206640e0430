"""Weights & Biases, where IMGLISH_WANDB asks for it: the figures of metrics.jsonl in a run of theirs, which goes on as
often as the stage does.

"offline" needs no network: everything lies in STAGE/wandb, and `wandb sync STAGE/wandb/offline-run-*` sends it later.
"online" sends it at once. WANDB_PROJECT, WANDB_ENTITY and the other variables of the package count as usual. It has
nothing that metrics.jsonl does not have: where it fails, one log line says so, and the run goes on without it.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.files import write_json
from pretrain.json_files import read_object, typed

log = logging.getLogger(__name__)

VARIABLE, MODES = "IMGLISH_WANDB", ("offline", "online")
NOTE = "wandb.json"  # beside metrics.jsonl: the id of the run
PROJECT = "imglish"


def chosen_mode() -> str:
    """What IMGLISH_WANDB says; "": nothing is wanted. ValueError for anything else than MODES, and where the package is
    missing."""
    mode = os.environ.get(VARIABLE, "")
    if mode and mode not in MODES:
        raise ValueError(f"{VARIABLE}={mode} is wrong; use {' or '.join(MODES)}, or unset it")
    if mode and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"{VARIABLE}={mode} needs a package that is not installed; call pip install -c launch/env/constraints.txt "
            "wandb, or unset it"
        )
    return mode


class WandbRun:
    """The run of the stage in `directory`. It has a curve for each figure over the step; steps that are done again have
    a second, equal point."""

    def __init__(self, directory: Path, mode: str):
        self._run: Any = None
        state = random.getstate()
        with self._lose():
            import wandb

            settings = wandb.Settings(
                # No output of the run, no code, no figures of the machine: it gets what metrics.jsonl has.
                **{"console": "off", "silent": True, "disable_git": True, "disable_code": True},
                **{"x_disable_stats": True, "x_disable_meta": True},
            )
            self._run = wandb.init(
                mode=mode,
                id=_id_of(directory),
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                group=directory.resolve().parent.name,
                name=f"{directory.resolve().parent.name}/{directory.name}",
                dir=str(directory),
                settings=settings,
            )
            # Its own count of steps only rises; ours goes back with the run.
            self._run.define_metric("*", step_metric="step")
        random.setstate(state)  # of this process, which a checkpoint has

    def write(self, step: int, values: dict[str, float | int]) -> None:
        with self._lose():
            if self._run is not None:
                self._run.log({"step": step, **values})

    def close(self) -> None:
        with self._lose():
            if self._run is not None:
                self._run.finish()

    @contextmanager
    def _lose(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service and its client think of
            why = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("Weights & Biases cannot be written: %s; metrics.jsonl has all of it", why)
            self._run = None


def _id_of(directory: Path) -> str:
    """The same at every start; a new one where the file is gone or damaged."""
    try:
        return typed(read_object(directory / NOTE), "id", str)
    except (OSError, ValueError):
        own = secrets.token_hex(8)
        write_json(directory / NOTE, {"id": own})
        return own
