"""A model with fusion on two ranks against one process."""

from __future__ import annotations

from collections.abc import Callable

from pretrain.optim import Optim, build_optimizer, schedule
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.step_batches import CONFIGS, DUAL, Trained, dual_batch, mean_reports, train_alone, train_on_ranks

OPTIM, STEPS = Optim(lr=1e-3, warmup_steps=1, clip=1.0), 3
Build = Callable[..., PretrainTask]  # of the layers, PLAIN by default; at the top level of its module


def train(build: Build, ds: str) -> Trained:
    """On this rank of two."""
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, partitioned_init
    from pretrain.parallel.mesh import create_mesh
    from pretrain.parallel.sizes import Parallel
    from pretrain.parallel.tensor import parallel_layers

    config = load_ds_config(CONFIGS / ds, micro=4 * DUAL // 2, accumulation=1, world=2, clip=OPTIM.clip)
    config.pop("bf16", None)
    mesh = create_mesh(Parallel())
    with partitioned_init(config):
        task = build(parallel_layers(mesh))
    engine = build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, STEPS), config)
    return train_on_ranks(engine, mesh, dual_batch, STEPS)


def check_equal(build: Build, ds: str, names: tuple[str, ...]) -> None:
    """Three steps on two ranks under ds_configs/`ds` report the losses `names` of one process."""
    alone = train_alone(build(), OPTIM, [dual_batch(step) for step in range(1, STEPS + 1)])
    reports = mean_reports(run_ranks(train, 2, build, ds))
    for name in names:
        off = [abs(own[name] - want[name]) for own, want in zip(reports, alone.reports, strict=True)]
        assert max(off) <= 1e-6, (name, off)
    assert alone.reports[0]["loss"] != alone.reports[1]["loss"]
