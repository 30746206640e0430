"""Who stands where, and talks to whom."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist

from pretrain.parallel.mesh import Mesh, Place, create_mesh, mpu_of, place_of
from pretrain.parallel.sizes import Parallel
from tests.distributed import run_ranks

SIZES = (
    Parallel(tensor=2),
    Parallel(sequence=2),
    Parallel(pipe=2),
    Parallel(tensor=2, sequence=2),
    Parallel(tensor=2, pipe=2),
    Parallel(tensor=4),
)


def test_tensor_ranks_are_neighbours_then_sequence_then_data_then_pipe():
    places = [place_of(Parallel(tensor=2, sequence=2), rank, 8) for rank in range(8)]
    assert [place[:4] for place in places] == [
        (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0), (0, 0, 1, 0), (1, 0, 1, 0), (0, 1, 1, 0), (1, 1, 1, 0),
    ]  # fmt: skip
    assert place_of(Parallel(tensor=2, pipe=2), 6, 8) == Place(tensor=0, sequence=0, data=1, pipe=1, data_size=2)
    assert place_of(Parallel(), 3, 5) == Place(0, 0, 3, 0, 5)


def test_the_order_is_that_of_deepspeeds_pipeline():
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    parallel = Parallel(tensor=2, pipe=3)
    topology = PipeModelDataParallelTopology(num_pp=3, num_mp=2, num_dp=2)
    for rank in range(12):
        place = place_of(parallel, rank, 12)
        assert topology.get_rank(pipe=place.pipe, data=place.data, model=place.tensor) == rank


@pytest.mark.parametrize(("world", "way_out"), [(6, "start 4 or 8 ranks"), (3, "start 4 ranks")])
def test_ranks_that_make_no_whole_copies_are_refused(world, way_out):
    sizes = r"parallel\.tensor \* parallel\.pipe=4"
    with pytest.raises(ValueError, match=rf"{world} ranks are not a multiple of {sizes}; {way_out}"):
        place_of(Parallel(tensor=2, pipe=2), 0, world)


def test_one_process_without_a_group_is_a_mesh_and_needs_no_megatron(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    mesh = create_mesh(Parallel())
    assert [axis.size for axis in mesh] == [1] * 5
    assert mpu_of(mesh) is None
    with pytest.raises(ValueError, match="1 ranks are not a multiple"):
        create_mesh(Parallel(tensor=2))


def members(axis) -> list[int]:
    if axis.size == 1:
        return [dist.get_rank()]
    return dist.get_process_group_ranks(axis.group or dist.group.WORLD)


def meshes() -> list[tuple]:
    """Of each size: the ranks of each axis, and what the mpu answers."""
    groups_of = []
    for parallel in SIZES:
        mesh = create_mesh(parallel)
        mpu, answers = mpu_of(mesh), None
        if mpu is not None:
            answers = {
                "src": mpu.get_tensor_model_parallel_src_rank(),
                "model": (mpu.get_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()),
                "data": (mpu.get_data_parallel_rank(), mpu.get_data_parallel_world_size()),
                "data ranks": dist.get_process_group_ranks(mpu.get_data_parallel_group()),
            }
        talk = torch.ones(1)
        dist.all_reduce(talk, group=mesh.copies.group)
        groups_of.append(({name: members(axis) for name, axis in mesh._asdict().items()}, answers, int(talk)))
    return groups_of


def test_groups_are_where_the_places_say():
    for rank, groups_of in enumerate(run_ranks(meshes, 4)):
        for parallel, (groups, answers, copies) in zip(SIZES, groups_of, strict=True):
            own = place_of(parallel, rank, 4)
            for axis in ("tensor", "sequence", "data", "pipe"):
                others = [r for r in range(4) if _differ(own, place_of(parallel, r, 4)) <= {axis}]
                assert groups[axis] == others, (parallel, rank, axis)
            assert groups["copies"] == [
                r for r in range(4) if _differ(own, place_of(parallel, r, 4)) <= {"data", "sequence"}
            ]
            assert copies == 4 // parallel.tensor // parallel.pipe
            if parallel.pipe > 1:
                assert answers is None, "under a pipeline DeepSpeed's own topology says it"
            else:
                assert answers == {
                    "src": rank - own.tensor,
                    "model": (own.tensor, parallel.tensor),
                    "data": (groups["copies"].index(rank), copies),
                    "data ranks": groups["copies"],
                }


def _differ(one: Place, other: Place) -> set[str]:
    return {name for name in Place._fields if getattr(one, name) != getattr(other, name)}


def without_megatron() -> str:
    sys.modules["megatron.core"] = None  # type: ignore[assignment]
    try:
        create_mesh(Parallel(tensor=2))
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_missing_megatron_is_said_in_a_sentence():
    assert "pip install" in run_ranks(without_megatron, 2)[0]


def test_plain_data_parallelism_is_the_whole_world():
    for rank, mesh in enumerate(run_ranks(plain_mesh, 2)):
        assert mesh == ([1, 1, 2, 1, 2], rank)


def plain_mesh() -> tuple[list[int], int]:
    sys.modules["megatron.core"] = None  # type: ignore[assignment]
    mesh: Mesh = create_mesh(Parallel())
    return [axis.size for axis in mesh], mesh.data.rank
