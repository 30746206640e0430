"""Which ranks talk to which: the process groups of data, sequence, tensor and pipeline parallelism. The only file that
touches Megatron's parallel_state.

Tensor ranks are neighbours, then sequence, then data, and pipeline stages lie furthest apart: the order of Megatron
(tp-cp-dp-pp) and of DeepSpeed's PipeModelDataParallelTopology, in which the ranks that talk most share a node.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch.distributed as dist

from pretrain.parallel.sizes import Parallel, world_problem


class Axis(NamedTuple):
    """One kind of parallelism as this rank sees it."""

    group: dist.ProcessGroup | None  # None: every rank of the world; not to be asked where size is 1
    rank: int
    size: int


class Mesh(NamedTuple):
    tensor: Axis  # splits each matrix
    sequence: Axis  # splits the rows of a micro-batch
    data: Axis  # other micro-batches
    pipe: Axis  # other blocks
    copies: Axis  # data x sequence: the ranks that hold the same weights, and over which ZeRO parts them


class Place(NamedTuple):
    """Where a rank stands, before there is any process group."""

    tensor: int
    sequence: int
    data: int
    pipe: int
    data_size: int


def place_of(parallel: Parallel, rank: int, world: int) -> Place:
    """Raises ValueError when `world` ranks do not split into copies of the model."""
    if problem := world_problem(parallel, world):
        raise ValueError(problem)
    data_size = world // parallel.model
    rest, tensor = divmod(rank, parallel.tensor)
    rest, sequence = divmod(rest, parallel.sequence)
    pipe, data = divmod(rest, data_size)
    return Place(tensor, sequence, data, pipe, data_size)


def create_mesh(parallel: Parallel, timeout_s: float = 1800.0) -> Mesh:
    """The groups of `parallel` in the initialised world; a collective of every rank. Plain data parallelism needs no
    Megatron. A call of a group that waits longer than `timeout_s` fails (NCCL ends the process, gloo raises).

    Raises ValueError when the sizes do not fit the world, or megatron-core is not installed.
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
    """What `deepspeed.initialize(mpu=)` and `zero.Init(mpu=)` want; None where DeepSpeed needs none: without tensor and
    sequence ranks, or under a pipeline, whose topology says the same."""
    if mesh.pipe.size > 1 or mesh.tensor.size == mesh.sequence.size == 1:
        return None
    return ModelParallelUnit(mesh)


class ModelParallelUnit:
    """Megatron's `mpu`, as far as DeepSpeed calls it. Sequence ranks hold the same weights as data ranks and have other
    rows, so to DeepSpeed they are data ranks: gradients are averaged, and ZeRO parts, over both."""

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
        """The first of this rank's tensor ranks, by its number in the world."""
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
            warnings.simplefilter("ignore")  # of optimizers that we do not use, and their missing Apex
            from megatron.core import parallel_state
    except ImportError as error:
        raise ValueError(
            f"{parallel} needs megatron-core ({error}); install it by `pip install megatron-core`, or set every size "
            "of parallel to 1"
        ) from error
    return parallel_state
