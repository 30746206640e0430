"""A running average of the weights in training. Each rank averages the fp32 master weights that its optimizer holds, so
that the average is split as they are. It is part of the optimizer's state, and is saved with the moments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pretrain.parallel.moments import AVERAGE, flats


@dataclass(frozen=True)
class Ema:
    """An exponential moving average: in each step, average = `decay` * average + (1 - `decay`) * weights. 0.9999 is the
    default of unilm's run_beit3_finetuning (--model_ema_decay); DeiT has 0.99996 (arXiv 2012.12877, table 9). `warmup`:
    the decay is at most (1 + step) / (10 + step), as in TensorFlow's ExponentialMovingAverage, so that a short stage's
    average does not keep the weights with which it began."""

    decay: float = 0.9999
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.decay < 1:
            raise ValueError(f"ema.decay={self.decay} must lie between 0 and 1; use 0.999 to 0.9999")

    def share(self, step: int) -> float:
        """The share of the weights after `step` in the average, 1 - decay."""
        return 1 - (min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay)


@torch.no_grad()
def begin_average(engine) -> None:
    """Sets the average of a new engine to its weights."""
    for flat, state in flats(engine):
        state[AVERAGE] = flat.detach().clone()


@torch.no_grad()
def follow(engine, share: float) -> None:
    """Moves the average by `share` of the way to the weights."""
    for flat, state in flats(engine):
        state[AVERAGE].lerp_(flat.detach(), share)


@contextmanager
def average_in_place(engine) -> Iterator[None]:
    """Exchanges average and weights inside, so that parallel/state.py reads the average."""
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
