"""From the loader to the device. On a GPU the batches of each step are copied, and their pictures flipped and jittered
where the loader leaves that to the GPU, while the step before computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

from pretrain.batch import Batch
from pretrain.jitter import finished

T = TypeVar("T")
U = TypeVar("U")


def copied(steps: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The micro-batches of each step on the device. On a GPU they are read one step ahead and copied on a stream of
    their own; an error that `steps` raises surfaces with the step that it belongs to."""
    if device.type != "cuda":
        yield from ([finished(batch.to(device)) for batch in step] for step in steps)
        return
    stream = torch.cuda.Stream(device)

    def start(step: list[Batch]) -> tuple[list[Batch], torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return [finished(batch.to(device)) for batch in step], stream.record_event()

    for batches, done in one_ahead(steps, start):
        computing = torch.cuda.current_stream(device)
        computing.wait_event(done)
        for batch in batches:
            for value in batch.every_tensor():
                value.record_stream(computing)  # so that its memory is not reused before that stream has read it
        yield batches


def one_ahead(items: Iterator[T], start: Callable[[T], U]) -> Iterator[U]:
    """start(item) for each item, the next one before the last is yielded. An error surfaces in its item's turn."""

    def begin() -> tuple[U] | Exception:
        try:
            return (start(next(items)),)
        except Exception as error:  # also StopIteration
            return error

    coming = begin()
    while True:
        if isinstance(coming, StopIteration):
            return
        if isinstance(coming, Exception):
            raise coming
        ready, coming = coming, begin()
        yield ready[0]
