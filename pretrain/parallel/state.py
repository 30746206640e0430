"""Assembles whole weights from the parts that ZeRO, tensor and pipe ranks hold, and splits them into such parts.

Names and shapes of whole weights are those of the model on one device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.distributed import all_gather, device

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh

Copy = Callable[[str, Tensor], Tensor]


def named_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by the names that they have in the model on one device."""
    return module.state_dict(keep_vars=True)


def dense_shape(value: Tensor, mesh: Mesh | None = None) -> tuple[int, ...]:
    """The shape on one device, and in files, of a parameter of which this rank may hold a part."""
    shape = padded_shape(value, mesh)
    return shape if real_rows(value) is None else (real_rows(value), *shape[1:])


def padded_shape(value: Tensor, mesh: Mesh | None) -> tuple[int, ...]:
    """The shape on one device, with the rows of padding that a vocabulary has in memory."""
    shape = list(getattr(value, "ds_shape", value.shape))
    split = split_dim(value)
    if split is not None and mesh is not None:
        shape[split] *= mesh.tensor.size
    return tuple(shape)


def fill(value: Any, whole: Tensor, mesh: Mesh | None = None) -> None:
    """Fills a parameter or buffer with this rank's part of the tensor `whole`, before the engine is built."""
    if real_rows(value) is not None:
        padding = padded_shape(value, mesh)[0] - len(whole)
        whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
    split = split_dim(value)
    if split is not None and mesh is not None:
        whole = whole.chunk(mesh.tensor.size, split)[mesh.tensor.rank]
    with torch.no_grad():
        if hasattr(value, "ds_id"):  # split by zero.Init
            value.ds_tensor.copy_(zero3_part(value, whole))
        else:
            value.copy_(whole)


def stream_state(engine, mesh: Mesh | None = None, copy: Copy | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor of each parameter and persistent buffer, in state_dict order (pipe stages one after
    another): on rank 0 fp32 on the CPU (integers stay integers), elsewhere an empty tensor. A collective of every rank,
    which holds one tensor at a time. `copy(name, value)` makes the copy on the CPU; by default in new memory."""
    mine = _whole(engine, mesh)
    if mesh is None or mesh.pipe.rank == 0:
        yield from ((name, _on_rank_0(name, value, copy)) for name, value in mine)
    if mesh is None or mesh.pipe.size == 1:
        return
    # Later stages send theirs along rank 0's pipeline; other pipelines hold the same weights and send nothing.
    in_line = mesh.copies.rank == 0 and mesh.tensor.rank == 0
    for stage in range(1, mesh.pipe.size):
        if stage == mesh.pipe.rank:
            for name, value in mine:
                if in_line:
                    _pass_on((name, value), stage, mesh)
            if in_line:
                _pass_on(None, stage, mesh)
        elif in_line:
            while (entry := _pass_on(None, stage, mesh)) is not None:
                name, value = entry
                yield name, _on_rank_0(name, value, copy)


def full_state(engine, mesh: Mesh | None = None, copy: Copy | None = None) -> dict[str, Tensor]:
    """The whole model by name on rank 0, {} on the others; see `stream_state`. Every rank must call it."""
    on_rank_0 = not dist.is_initialized() or dist.get_rank() == 0
    return {name: value for name, value in stream_state(engine, mesh, copy) if on_rank_0}


def _whole(engine, mesh: Mesh | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of this rank's pipe stage, each whole on every rank of the stage."""
    fragment = importlib.import_module("deepspeed.utils.tensor_fragment")
    zero = importlib.import_module("deepspeed.runtime.zero")
    for name, value in named_state(engine.module).items():
        with torch.no_grad():
            whole = None
            if isinstance(value, nn.Parameter) and value.requires_grad:
                whole = fragment.safe_get_full_fp32_param(value)  # the optimizer's master, where there is one
            if whole is not None:
                yield name, _join(value, whole, mesh)
            elif hasattr(value, "ds_id"):
                with zero.GatheredParameters([value]):
                    whole = _join(value, value.detach().clone(), mesh)
                yield name, whole
            else:
                yield name, _join(value, value.detach(), mesh)


def _join(value: Tensor, part: Tensor, mesh: Mesh | None) -> Tensor:
    """All tensor ranks' parts joined, without padding."""
    if split_dim(value) is not None and mesh is not None and mesh.tensor.size > 1:
        part = torch.cat(all_gather(part, mesh.tensor.group), split_dim(value))
    rows = real_rows(value)
    return part if rows is None else part[:rows]


def _on_rank_0(name: str, value: Tensor, copy: Copy | None) -> Tensor:
    if dist.is_initialized() and dist.get_rank() != 0:
        return torch.empty(0)
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    if copy is not None:
        return copy(name, value.to(dtype))
    # Always a copy: masters and gathered parameters are views of buffers that the next step overwrites.
    return value.to("cpu", dtype, copy=True).contiguous()


def _pass_on(mine: tuple[str, Tensor] | None, stage: int, mesh: Mesh) -> tuple[str, Tensor] | None:
    """Broadcasts one tensor of pipe stage `stage` along the pipeline: its owner passes it as `mine`, or None when there
    are no more; every rank returns it."""
    source = dist.get_global_rank(mesh.pipe.group, stage)
    about: list[Any] = [None if mine is None else (mine[0], tuple(mine[1].shape), mine[1].dtype)]
    dist.broadcast_object_list(about, source, group=mesh.pipe.group, device=device())
    if about[0] is None:
        return None
    name, shape, dtype = about[0]
    there = torch.empty(shape, dtype=dtype, device=device()) if mine is None else mine[1].contiguous()
    dist.broadcast(there, source, group=mesh.pipe.group)
    return name, there


# ---- parts


def split_dim(value: Any) -> int | None:
    """The dimension along which tensor ranks split a parameter; None if each of them holds it whole."""
    return value.partition_dim if getattr(value, "tensor_model_parallel", False) else None


def real_rows(value: Any) -> Any:
    """How many rows of a padded vocabulary are real (layers.mark_padded); None for any other tensor."""
    return getattr(value, "real_rows", None)


def zero3_part(value: Any, whole: Tensor) -> Tensor:
    """This rank's part of a tensor as ZeRO-3 splits it: equal parts of the flattened whole, with zeros behind its end.
    (DeepSpeed's own setter of whole tensors fails if they do not divide equally.)"""
    length = value.ds_tensor.ds_numel
    start = dist.get_rank(value.ds_process_group) * length
    flat = whole.flatten()[start : start + length]
    return nn.functional.pad(flat, (0, length - flat.numel()))
