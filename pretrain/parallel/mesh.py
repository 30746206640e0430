"""The process groups of data, sequence, tensor and pipeline parallelism. The only file that touches Megatron's
parallel_state.

Tensor ranks are neighbours, then come sequence ranks, then data ranks, and pipe stages lie furthest apart: the order of
Megatron (tp-cp-dp-pp) and of DeepSpeed's PipeModelDataParallelTopology. So the ranks that communicate most share a
node.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch.distributed as dist

from pretrain.parallel.sizes import Parallel, world_problem


class Axis(NamedTuple):
    """One kind of parallelism as this rank sees it."""

    group: dist.ProcessGroup | None  # None: every rank of the world; must not be used if size is 1
    rank: int  # of this rank in the group
    size: int


class Mesh(NamedTuple):
    """All kinds of parallelism as this rank sees them."""

    tensor: Axis  # its ranks split each matrix
    sequence: Axis  # its ranks split the rows of a micro-batch
    data: Axis  # its ranks have other micro-batches
    pipe: Axis  # its ranks have other blocks
    copies: Axis  # data x sequence: the ranks that hold the same weights, and over which ZeRO splits its state


class Place(NamedTuple):
    """A rank's numbers in each kind of parallelism, known before there is any process group."""

    tensor: int
    sequence: int
    data: int
    pipe: int
    data_size: int


def place_of(parallel: Parallel, rank: int, world: int) -> Place:
    """The place of rank `rank` in a world of `world` ranks. Raises ValueError if these do not divide into copies of the
    model."""
    if problem := world_problem(parallel, world):
        raise ValueError(problem)
    data_size = world // parallel.model
    rest, tensor = divmod(rank, parallel.tensor)
    rest, sequence = divmod(rest, parallel.sequence)
    pipe, data = divmod(rest, data_size)
    return Place(tensor, sequence, data, pipe, data_size)


def create_mesh(parallel: Parallel, timeout_s: float = 1800.0) -> Mesh:
    """The groups of `parallel` in the initialised world; a collective of every rank. Plain data parallelism needs no
    Megatron. A collective that waits longer than `timeout_s` fails (NCCL ends the process, gloo raises).

    Raises ValueError if the sizes do not fit the world, or if megatron-core is not installed.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    place = place_of(parallel, rank, world)
    alone, everyone = Axis(None, 0, 1), Axis(None, rank, world)
    if parallel.model == 1:
        return Mesh(tensor=alone, sequence=alone, data=everyone, pipe=alone, copies=everyone)
    state = _parallel_state(parallel)
    state.destroy_model_parallel()  # of an earlier mesh in this process
    state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        context_parallel_size=parallel.sequence,
        pipeline_model_parallel_size=parallel.pipe,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout_s / 60,
    )
    mesh = Mesh(
        tensor=_axis(state.get_tensor_model_parallel_group()),
        sequence=_axis(state.get_context_parallel_group()),
        data=_axis(state.get_data_parallel_group()),
        pipe=_axis(state.get_pipeline_model_parallel_group()),
        copies=_axis(state.get_data_parallel_group(with_context_parallel=True)),
    )
    actual = Place(mesh.tensor.rank, mesh.sequence.rank, mesh.data.rank, mesh.pipe.rank, mesh.data.size)
    assert actual == place, (actual, place)
    return mesh


def mpu_of(mesh: Mesh) -> ModelParallelUnit | None:
    """The argument `mpu` of `deepspeed.initialize` and `zero.Init`; None where DeepSpeed needs none: without tensor and
    sequence ranks, or under a pipeline, which gets the same from its topology."""
    if mesh.pipe.size > 1 or mesh.tensor.size == mesh.sequence.size == 1:
        return None
    return ModelParallelUnit(mesh)


class ModelParallelUnit:
    """The part of Megatron's `mpu` that DeepSpeed calls. Sequence ranks hold the same weights as data ranks and have
    other rows, so to DeepSpeed they are data ranks: it averages gradients, and splits ZeRO's state, over both."""

    def __init__(self, mesh: Mesh):
        self._tensor, self._copies = mesh.tensor, mesh.copies

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tensor.group

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """The first rank of this rank's tensor group, by its number in the world."""
        return dist.get_rank() - self._tensor.rank

    def get_data_parallel_rank(self) -> int:
        return self._copies.rank

    def get_data_parallel_world_size(self) -> int:
        return self._copies.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._copies.group


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(group, dist.get_rank(group), dist.get_world_size(group))


def _parallel_state(parallel: Parallel) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron warns that Apex is missing, for optimizers that we do not use
            from megatron.core import parallel_state
    except ImportError as error:
        raise ValueError(
            f"{parallel} needs megatron-core ({error}); install it by `pip install megatron-core`, or set every size "
            "of parallel to 1"
        ) from error
    return parallel_state
