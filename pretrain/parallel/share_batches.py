"""The tensor and sequence ranks of one model copy see the same micro-batches: the first of them loads and sends them.

In a pipeline the first and the last stage each have a rank that loads, and the stages between have none. Each step is
sent as one tensor of bytes, with a header that describes it, by the groups' own collectives in the main thread: NCCL
must see the collectives of a group in the same order on every rank.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch, Layout
from pretrain.distributed import device
from pretrain.parallel.copy_ahead import copied
from pretrain.parallel.faults import Watch
from pretrain.parallel.mesh import Axis, Mesh

# What a loader may raise: ShardError (a ValueError), OSError, TimeoutError if a store has trouble, RuntimeError if a
# data worker was killed.
LOADING = (ValueError, OSError, RuntimeError)
ARRAY = "array"  # how the header marks one


def loads(mesh: Mesh) -> bool:
    """Whether this rank reads data itself."""
    return mesh.pipe.rank in (0, mesh.pipe.size - 1) and mesh.tensor.rank == mesh.sequence.rank == 0


def share_batches(load: Callable[[], Iterator[list[Batch]]], mesh: Mesh, watch: Watch) -> Iterator[list[Batch]]:
    """The micro-batches of each step on this rank's device, from `load()` on the rank that loads; [] on a pipeline's
    middle stages. Every rank of the group must take the same number of steps. An error of `load()` is raised on all of
    them, with the same text."""
    if mesh.pipe.rank not in (0, mesh.pipe.size - 1):
        while True:
            yield []
    # The first tensor rank of each sequence rank, then its tensor group.
    axes = [axis for axis, by in ((mesh.sequence, mesh.tensor.rank == 0), (mesh.tensor, True)) if axis.size > 1 and by]
    if not loads(mesh):
        while True:
            yield _unpack(*_pass_on(axes, None))
    batches = copied(load(), device())
    while True:
        watch.waits_for_data = True
        try:
            step = next(batches)
        except StopIteration:
            return
        except LOADING as error:
            watch.waits_for_data = False
            _pass_on(axes, (_failure(error), torch.empty(0, dtype=torch.uint8, device=device())))
            raise
        watch.waits_for_data = False
        if axes:
            _pass_on(axes, _pack(step))
        yield step


def _pass_on(axes: list[Axis], parcel: tuple[bytes, Tensor] | None) -> tuple[bytes, Tensor]:
    """The header and the bytes [n] of the first rank of all `axes`, which gives them as `parcel`, broadcast along one
    axis after another."""
    for axis in axes:
        source = dist.get_global_rank(axis.group, 0)
        sizes = torch.tensor([0, 0] if parcel is None else [len(part) for part in parcel], device=device())
        dist.broadcast(sizes, source, group=axis.group)
        if parcel is None:
            header, content = (torch.empty(size, dtype=torch.uint8, device=device()) for size in sizes.tolist())
        else:
            header = torch.frombuffer(bytearray(parcel[0]), dtype=torch.uint8).to(device())
            content = parcel[1]
        dist.broadcast(header, source, group=axis.group)
        if content.numel():
            dist.broadcast(content, source, group=axis.group)
        parcel = parcel or (header.cpu().numpy().tobytes(), content)
    assert parcel is not None
    return parcel


def _pack(step: list[Batch]) -> tuple[bytes, Tensor]:
    """A step's batches as a header and the bytes of all tensors; see `_unpack`."""
    about = [
        {
            "layout": vars(batch.layout),
            "keys": batch.keys,
            "extra": {name: _plain(value) for name, value in batch.extra.items() if not isinstance(value, Tensor)},
            "tensors": {name: (str(t.dtype).removeprefix("torch."), t.shape) for name, t in batch.tensors()},
        }
        for batch in step
    ]
    contents = [dict(batch.tensors()) for batch in step]
    flat = [contents[place][name].contiguous().flatten().view(torch.uint8) for place, name, *_ in _order(about)]
    return json.dumps({"batches": about}).encode(), torch.cat(flat)


def _unpack(header: bytes, content: Tensor) -> list[Batch]:
    """Batches whose tensors are views of `content`; raises what `_failure` noted."""
    message = json.loads(header)
    if "error" in message:
        raise {"process": RuntimeError, "store": TimeoutError}.get(message["kind"], ValueError)(message["error"])
    contents: list[dict[str, Tensor]] = [{} for _ in message["batches"]]
    start = 0
    for place, name, dtype, shape in _order(message["batches"]):
        end = start + dtype.itemsize * torch.Size(shape).numel()
        contents[place][name] = content[start:end].view(dtype).view(shape)
        start = end
    batches = []
    for about, tensors in zip(message["batches"], contents, strict=True):
        own = {name: value for name, value in tensors.items() if "/" not in name}
        extra = {name: tuple(map(_restored, value)) for name, value in about["extra"].items()}
        batch = Batch(layout=Layout(**about["layout"]), keys=tuple(about["keys"]), extra=extra, **own)
        # Here, and not in the step, since it waits for the device.
        batches.append(batch.with_tensors(tensors).indexed())
    return batches


def _plain(values: tuple[Any, ...]) -> list[Any]:
    """For JSON: arrays of several shapes, which are no tensor, as lists beside their types."""
    return [
        {ARRAY: each.dtype.str, "values": each.tolist()} if isinstance(each, np.ndarray) else each for each in values
    ]


def _restored(value: Any) -> Any:
    return np.array(value["values"], np.dtype(value[ARRAY])) if isinstance(value, dict) and ARRAY in value else value


def _order(about: list[dict[str, Any]]) -> list[tuple[int, str, torch.dtype, list[int]]]:
    """(batch, name, dtype, shape) of each tensor, in the order of the bytes: wide numbers first, so that all are
    aligned to their width."""
    every = [
        (place, name, getattr(torch, dtype), shape)
        for place, batch in enumerate(about)
        for name, (dtype, shape) in batch["tensors"].items()
    ]
    return sorted(every, key=lambda tensor: -tensor[2].itemsize)


def _failure(error: Exception) -> bytes:
    """The header for an error of the rank that loads."""
    kind = "process" if isinstance(error, RuntimeError) else "store" if isinstance(error, TimeoutError) else ""
    return json.dumps({"error": str(error), "kind": kind}).encode()
