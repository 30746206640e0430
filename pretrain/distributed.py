"""Rank, world size and the few collectives in use; they work with and without an initialised process group."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's number among all of the job: torch's, or before it is set up RANK's, which is 0 without a
    launcher."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes the job has; 1 without a launcher."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number among those of its node; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def device() -> torch.device:
    """This rank's GPU if there is one, otherwise the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each rank only its own GPU, as number 0.
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def barrier() -> None:
    """Waits for all ranks. Does nothing in a process alone."""
    if dist.is_initialized():
        dist.barrier()


def reduce_mean(values: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """The mean over the ranks of each named scalar, in one collective. Every rank must pass the same names."""
    names = sorted(values)
    packed = torch.stack([values[name].detach().double().reshape(()) for name in names])
    if dist.is_initialized():
        dist.all_reduce(packed, group=group)
        packed /= dist.get_world_size(group)
    return dict(zip(names, packed.tolist(), strict=True))


def gather_objects(own: T) -> list[T]:
    """Every rank's object, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [own]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return everyone


def fail_together(action: Callable[[], T]) -> T:
    """What `action` returns on this rank; an OSError on all ranks when it raised one on any of them, so that they take
    the same branch."""
    result: Any = None
    failure = None
    try:
        result = action()
    except OSError as error:
        file = f" ({error.filename})" if error.filename else ""
        failure = (error.errno or errno.EIO, f"{error.strerror or error}{file}")
    for number, failed in enumerate(gather_objects(failure)):
        if failed is not None:
            raise OSError(failed[0], f"rank {number}: {failed[1]}")
    return result


def refuse_together(problem: str | None) -> None:
    """Raises ValueError on every rank with the first problem that any rank has, so that all take the same branch."""
    for each in gather_objects(problem):
        if each is not None:
            raise ValueError(each)


def highest(values: Sequence[int], on: torch.device) -> list[int]:
    """Each value's maximum over all ranks, in one collective on the device `on`."""
    if not dist.is_initialized():
        return list(values)
    maxima = torch.tensor(values, device=on)
    dist.all_reduce(maxima, op=dist.ReduceOp.MAX)
    return maxima.tolist()


def all_gather(own: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Every rank's tensor, in rank order and without gradients. Every rank must pass the same shape."""
    own = own.contiguous()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own, group=group)
    return parts


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, group) -> Tensor:
        ctx.group, ctx.count = group, rows.shape[0]
        return torch.cat(all_gather(rows, group))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss reads these rows: their gradients add up.
        grad = grads[0].contiguous()
        dist.all_reduce(grad, group=ctx.group)
        first = dist.get_rank(ctx.group) * ctx.count
        return grad[first : first + ctx.count], None


def gather_rows(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All ranks' `rows` [n, ...], concatenated in rank order, [world * n, ...]. The gradient of a row goes back to the
    rank that owns it, summed over all ranks. Every rank must pass the same shape."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return rows
    return _GatherRows.apply(rows, group)


def gather_own(rows: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, int]:
    """`gather_rows`, and the place of this rank's first row among them."""
    own = dist.get_rank(group) * len(rows) if dist.is_initialized() else 0
    return gather_rows(rows, group), own


def visit_ranks(
    rows: Tensor, see: Callable[[Tensor, int], Tensor | None], group: dist.ProcessGroup | None = None
) -> Tensor | None:
    """Calls `see(rows, distance)` on every rank with every rank's `rows` [n, ...], one rank's after another's, so that
    only one rank's are held at a time. `distance`: how many rows they lie behind this rank's own in the order of all
    ranks' rows. The tensors that `see` returns for a rank's rows are summed over all ranks and returned to that rank,
    without gradients; None if `see` returns None. Every rank must pass the same shape."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return see(rows, 0)
    own, back = dist.get_rank(group), None
    for number in range(dist.get_world_size(group)):
        source = number if group is None else dist.get_global_rank(group, number)
        shown = rows.contiguous() if number == own else torch.empty_like(rows, memory_format=torch.contiguous_format)
        dist.broadcast(shown, source, group=group)
        answer = see(shown, (number - own) * len(rows))
        if answer is not None:
            dist.reduce(answer, source, group=group)
            back = answer if number == own else back
    return back
