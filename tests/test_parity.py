"""The real task through the real train_step: ZeRO on two ranks against one plain torch process."""

from __future__ import annotations

import math
from itertools import product

import torch

from pretrain.batch import Batch
from pretrain.optim import Optim, build_optimizer, schedule
from pretrain.parallel.sizes import Parallel
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.step_batches import (
    CONFIGS,
    DROP,
    EXPERTS,
    MASKED,
    PAPER,
    Trained,
    mean_reports,
    step_batch,
    train_alone,
    train_on_ranks,
)

OPTIM = Optim(lr=2e-3, warmup_steps=2, weight_decay=0.05, clip=0.5)
STEPS, RANKS = 6, 2
# Each step another mix: all three kinds, then each alone. Global numbers of (images, pairs, texts).
MIXES = ((4, 4, 4), (8, 0, 0), (0, 4, 0), (0, 0, 8), (4, 0, 4), (4, 4, 4))


def task() -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(PAPER, EXPERTS, (MASKED,), drop_path=DROP)


def micro_batch(step: int, part: int, parts: int) -> Batch:
    """Part `part` of `parts` equal ones of step's global batch."""
    return step_batch(MIXES[step - 1], step, part, parts)


def every_config() -> list[Trained]:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine
    from pretrain.parallel.mesh import create_mesh

    mesh, runs = create_mesh(Parallel()), []
    for stage, accumulation in product(range(4), (1, 2)):
        sizes = {"micro": 4, "accumulation": accumulation, "world": RANKS}
        config, module = load_ds_config(CONFIGS / f"zero{stage}.json", **sizes, clip=OPTIM.clip), task()
        engine = build_engine(module, build_optimizer(module, OPTIM), schedule(OPTIM, STEPS), config)
        runs.append(train_on_ranks(engine, mesh, micro_batch, STEPS))
    return runs


def test_zero_equals_one_process_over_steps_that_mix_kinds():
    reports, norms, state = train_alone(task(), OPTIM, [micro_batch(step, 0, 1) for step in range(1, STEPS + 1)])
    assert any(norm > OPTIM.clip for norm in norms), "clipping must have been active"
    cases = list(zip(*run_ranks(every_config, RANKS, timeout=200), strict=True))
    assert len(cases) == 8
    for case, ranks in enumerate(cases):
        for got, want in zip(mean_reports(ranks), reports, strict=True):
            assert abs(got["loss"] - want["loss"]) <= 1e-6, (case, got, want)
        for got, want in zip(ranks[0].norms, norms, strict=True):
            assert math.isclose(got, want, rel_tol=1e-5), case
        for name, value in ranks[0].weights.items():
            assert (value - state[name]).abs().max() <= 1e-6, (case, name)
