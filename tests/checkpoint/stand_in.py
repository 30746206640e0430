"""An engine that holds one number, for tests of what happens to its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from pretrain.checkpoint import save as saving
from pretrain.checkpoint import saver, snapshot
from pretrain.checkpoint.save import newest, resume
from pretrain.checkpoint.weights import read_weights
from pretrain.parallel.moments import Moments


class StandIn:
    """What a save asks an engine; weights and moments are one number (see `install`)."""

    def __init__(self, value: float = 0.0, stage: int = 1):
        self.value, self.stage = torch.full((1000,), float(value)), stage

    def zero_optimization_stage(self) -> int:
        return self.stage

    def bfloat16_enabled(self) -> bool:
        return False


def install(replace: Callable[[Any, str, Any], None]) -> None:
    """Makes this process's saves those of stand-ins; `replace` is setattr, or a monkeypatch's."""

    def full_state(engine: StandIn, mesh: object, copy: Callable[[str, Tensor], Tensor] | None = None):
        return {"weight": engine.value[:3].clone() if copy is None else copy("weight", engine.value[:3])}

    def read(engine: StandIn, mesh: object, files: list[Path]) -> None:
        engine.value = load(files[0].read_bytes())["value"]

    replace(saver, "full_state", full_state)
    replace(snapshot, "own_moments", lambda engine, mesh: Moments({"value": engine.value}, {}))
    replace(saving, "read_moments", read)
    replace(saving, "set_progress", lambda engine, step: None)


def restored_value(directory: Path, **identity: str) -> tuple[int, float] | None:
    """Step and moments of the newest checkpoint; its weights must be the step."""
    checkpoint = newest(directory, **{"precision": "fp32", **identity})
    if checkpoint is None:
        return None
    engine = StandIn()
    resume(engine, checkpoint)
    assert read_weights(checkpoint.weights)[0]["weight"][0] == checkpoint.step
    return checkpoint.step, float(engine.value[0])
