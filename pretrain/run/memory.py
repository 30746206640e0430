"""Turns a GPU's out-of-memory error into one sentence with the knobs that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.config import Stage


@contextmanager
def memory_suffices(stage: Stage) -> Iterator[None]:
    """Raises ValueError, with the stage's knobs, if the GPU's memory is exhausted inside."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = str(error).split(". ")[:2]  # torch's further figures, and advice that launch/ follows already, are cut
        raise ValueError(
            f"the GPU's memory is full ({'. '.join(what)}): batch.accumulation={stage.batch.accumulation} and "
            f"activation_checkpointing={int(stage.activation_checkpointing)}; raise batch.accumulation, which makes "
            "micro-batches smaller, or set activation_checkpointing=1 (python -m pretrain.plan says what fits)"
        ) from error
