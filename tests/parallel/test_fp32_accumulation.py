"""bf16 with gradients that are added up in fp32 (data_types.grad_accum_dtype): right, and a run goes on to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pretrain.optim import build_optimizer, schedule
from pretrain.parallel.mesh import create_mesh
from pretrain.parallel.sizes import Parallel
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.step_batches import CONFIGS, EXPERTS, MASKED, PAPER, step_batch
from tests.test_parity import OPTIM

ACCUMULATION = 12


def _engine(place: Path, ds: str, dtype: str | None, state: dict | None = None):
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, init_distributed

    init_distributed()
    mesh = create_mesh(Parallel())
    config = json.loads((CONFIGS / ds).read_text()) | ({"data_types": {"grad_accum_dtype": dtype}} if dtype else {})
    path = place / f"{mesh.data.rank}.json"
    path.write_text(json.dumps(config))
    config = load_ds_config(path, micro=1, accumulation=ACCUMULATION, world=mesh.data.size, clip=OPTIM.clip)
    torch.manual_seed(0)
    task = PretrainTask(PAPER, EXPERTS, (MASKED,))
    if state is not None:
        task.load_state_dict(state)
    return build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, 4), config), mesh


def _train(engine, mesh, steps: range) -> list[float]:
    from pretrain.parallel.skipping import gradient_norm

    norms = []
    for step in steps:
        for micro in range(ACCUMULATION):
            batch = step_batch((4, 4, 4), step * ACCUMULATION + micro, mesh.data.rank, mesh.data.size)
            engine.backward(engine(batch)["loss"])
            engine.step()
        norms.append(float(gradient_norm(engine)))
    return norms


def left_alone_and_resumed(place: Path, ds: str) -> tuple[dict, dict]:
    from pretrain.distributed import barrier, rank
    from pretrain.parallel.engine import set_progress
    from pretrain.parallel.moments import own_moments, read_moments, write_moments
    from pretrain.parallel.state import full_state

    engine, mesh = _engine(place, ds, "fp32")
    _train(engine, mesh, range(1, 3))
    with open(place / f"{rank()}.safetensors", "wb") as file:
        write_moments(own_moments(engine, mesh), file)
    if state := full_state(engine, mesh):
        torch.save(state, place / "state")
    barrier()
    _train(engine, mesh, range(3, 5))
    alone = full_state(engine, mesh)
    engine, mesh = _engine(place, ds, "fp32", torch.load(place / "state"))
    set_progress(engine, 2)
    read_moments(engine, mesh, sorted(place.glob("*.safetensors")))
    _train(engine, mesh, range(3, 5))
    return alone, full_state(engine, mesh)


@pytest.mark.parametrize("ds", [f"zero{stage}_bf16.json" for stage in (1, 2, 3)])
def test_a_resumed_run_is_bit_equal(tmp_path, ds):
    alone, resumed = run_ranks(left_alone_and_resumed, 2, tmp_path, ds)[0]
    torch.testing.assert_close(resumed, alone, atol=0, rtol=0)


def first_norm(place: Path, runs: list[tuple[str, str | None]]) -> list[float]:
    return [_train(*_engine(place, *run), range(1, 2))[0] for run in runs]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_gradients_norm_is_near_that_of_fp32(tmp_path, stage):
    bf16 = f"zero{stage}_bf16.json"
    right, mixed = run_ranks(first_norm, 1, tmp_path, [("zero1.json", None), (bf16, "fp32")])[0]
    assert mixed == pytest.approx(right, rel=2e-3)
