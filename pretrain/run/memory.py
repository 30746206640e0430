"""A device whose memory is full: what a user reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.config import Stage


@contextmanager
def memory_suffices(stage: Stage) -> Iterator[None]:
    """ValueError where the device's memory does not."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = str(error).split(". ")[:2]  # then come torch's own figures, and advice that is set in launch/
        raise ValueError(
            f"the GPU's memory is full ({'. '.join(what)}): batch.accumulation={stage.batch.accumulation} and "
            f"activation_checkpointing={int(stage.activation_checkpointing)}; raise batch.accumulation, which makes "
            "micro-batches smaller, or set activation_checkpointing=1 (python -m pretrain.plan says what fits)"
        ) from error
