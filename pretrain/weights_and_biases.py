"""Weights & Biases, where IMGLISH_WANDB asks for it: one of its runs shows the figures of metrics.jsonl, and goes on
whenever the stage is started again.

"offline" needs no network: everything lies in STAGE/wandb, and `wandb sync STAGE/wandb/offline-run-*` sends it later.
"online" sends it at once. WANDB_PROJECT, WANDB_ENTITY and the other variables of the package count as usual.
metrics.jsonl has everything that is sent, so where Weights & Biases fails, one log line says so and training goes on.
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
    """The mode that IMGLISH_WANDB names; "" where it is not set. ValueError for a mode that is not in MODES, and where
    the package is missing."""
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
    """The run that shows the stage in `directory`, with a curve over the steps for each figure. A step that is trained
    again after a restart has a second point, equal to the first."""

    def __init__(self, directory: Path, mode: str):
        self._run: Any = None
        state = random.getstate()
        with self._tolerate():
            import wandb

            settings = wandb.Settings(
                # It gets what metrics.jsonl has: no output of the process, no code, no figures of the machine.
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
            # wandb's own count of steps can only rise; ours goes back when a run does.
            self._run.define_metric("*", step_metric="step")
        random.setstate(state)  # wandb draws from this process's generator, whose state is in our checkpoints

    def write(self, step: int, values: dict[str, float | int]) -> None:
        with self._tolerate():
            if self._run is not None:
                self._run.log({"step": step, **values})

    def close(self) -> None:
        with self._tolerate():
            if self._run is not None:
                self._run.finish()

    @contextmanager
    def _tolerate(self) -> Iterator[None]:
        """After an error nothing more is sent, and a log line says so."""
        try:
            yield
        except Exception as error:  # a service and its client can fail in any way
            why = (str(error) or type(error).__name__).splitlines()[0]
            log.warning("Weights & Biases cannot be written: %s; metrics.jsonl has all of it", why)
            self._run = None


def _id_of(directory: Path) -> str:
    """The id of the stage's run, the same at every start; a new one where its file is gone or damaged."""
    try:
        return typed(read_object(directory / NOTE), "id", str)
    except (OSError, ValueError):
        new = secrets.token_hex(8)
        write_json(directory / NOTE, {"id": new})
        return new
