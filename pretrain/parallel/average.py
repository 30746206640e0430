"""A running average of the weights in training. Each rank averages the fp32 masters that its optimizer holds, so it is
split as they are; it lies among the optimizer's state, and checkpoints have it as they have the moments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pretrain.parallel.moments import AVERAGE, flats


@dataclass(frozen=True)
class Ema:
    """Of each step's weights 1 - `decay` goes into the average. 0.9999 is the default of unilm's run_beit3_finetuning
    (--model_ema_decay); DeiT has 0.99996 (arXiv 2012.12877, table 9). `warmup`: at first the decay is
    (1 + step) / (10 + step), as TensorFlow's ExponentialMovingAverage has it, so that the weights with which a stage
    began do not stay in the average of a short one."""

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must lie between 0 and 1; use 0.999 to 0.9999")

    def share(self, step: int) -> float:
        """Of the weights after `step` in the average."""
        return 1 - (min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay)


@torch.no_grad()
def begin_average(engine) -> None:
    """For an engine that was just built: the average is its weights."""
    for flat, state in flats(engine):
        state[AVERAGE] = flat.detach().clone()


@torch.no_grad()
def follow(engine, share: float) -> None:
    for flat, state in flats(engine):
        state[AVERAGE].lerp_(flat.detach(), share)


@contextmanager
def average_in_place(engine) -> Iterator[None]:
    """Inside, the average stands where the weights are read from (parallel/state.py), and they where it was."""
    _swap(engine)
    try:
        yield
    finally:
        _swap(engine)


@torch.no_grad()
def _swap(engine) -> None:
    for flat, state in flats(engine):
        weights = flat.detach().clone()
        flat.data.copy_(state[AVERAGE])
        state[AVERAGE].copy_(weights)
