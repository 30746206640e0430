"""The pipeline engine on ranks against one plain process: losses, gradient norms, weights and reports."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch

from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim, build_optimizer, schedule
from pretrain.parallel.sizes import Parallel
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.step_batches import (
    CONFIGS,
    DROP,
    EXPERTS,
    MASKED,
    MODELS,
    TIED,
    Mix,
    Trained,
    freeze,
    mean_reports,
    step_batch,
    step_layout,
    train_alone,
    train_on_ranks,
)

OPTIM = Optim(lr=1e-3, warmup_steps=2, weight_decay=0.05, clip=0.5)
STEPS, DEPTH = 5, 4
PP2, PP4, TP2_PP2 = Parallel(pipe=2), Parallel(pipe=4), Parallel(tensor=2, pipe=2)
# Images, pairs and texts of a global batch.
ALL, IMAGES, PAIRS, TEXTS = (8, 8, 8), (8, 0, 0), (0, 8, 0), (0, 0, 8)
TOP = ("objectives.*", "encoder.norm.*", "encoder.blocks.3.*")  # with it the first stage has nothing to train
LANGUAGE = ("*.language.*", "objectives.*", "encoder.text_embed.*")
BF16 = "zero1_bf16.json"


class Case(NamedTuple):
    """A run of STEPS steps."""

    mix: Mix = ALL
    model: str = "paper"
    experts: tuple[str, ...] = EXPERTS
    objective: MaskedData = MASKED
    trainable: tuple[str, ...] = ("*",)
    accumulation: int = 1
    checkpointing: int = 0
    ds: str = "zero1.json"
    parallel: Parallel = PP2


TWO_RANKS = {
    "images, accumulation 4": Case(IMAGES, accumulation=4),
    "pairs": Case(PAIRS),
    "texts, accumulation 4": Case(TEXTS, accumulation=4),
    "one expert": Case(IMAGES, experts=("vision",)),
    "frozen experts": Case(trainable=LANGUAGE, accumulation=2),
    "frozen stage": Case(trainable=TOP, accumulation=2),
    "tied": Case(objective=TIED, accumulation=4),
    "tied and frozen": Case(objective=TIED, trainable=("objectives.masked.*", "*blocks*")),
    "vlmo, checkpointing": Case(model="vlmo", checkpointing=1, accumulation=2),
    "bf16, tied, accumulation 4": Case(ds=BF16, objective=TIED, accumulation=4),
}
FOUR_RANKS = {
    "two pipelines": Case(),
    "two pipelines, tied, accumulation 4": Case(objective=TIED, accumulation=4),
    "two pipelines, frozen stage": Case(trainable=TOP, accumulation=2),
    "four stages": Case(parallel=PP4),
    "four stages, vlmo, accumulation 4": Case(parallel=PP4, model="vlmo", accumulation=4),
    "four stages, one frozen": Case(parallel=PP4, trainable=(*TOP, "*.blocks.1.*"), accumulation=2),
    "tensor": Case(parallel=TP2_PP2),
    "tensor, tied, accumulation 4": Case(parallel=TP2_PP2, objective=TIED, accumulation=4),
    "tensor, released": Case(parallel=TP2_PP2, model="released", checkpointing=2),
    "tensor, vlmo, frozen stage": Case(parallel=TP2_PP2, model="vlmo", trainable=TOP, accumulation=2),
    "bf16, two pipelines, accumulation 4": Case(ds=BF16, accumulation=4),
    "bf16, tensor": Case(parallel=TP2_PP2, ds=BF16),
}


def plain(case: Case) -> Trained:
    return _plain(*case[: Case._fields.index("accumulation")])


@cache
def _plain(
    mix: Mix, model: str, experts: tuple[str, ...], objective: MaskedData, trainable: tuple[str, ...]
) -> Trained:
    torch.manual_seed(0)
    task = PretrainTask(replace(MODELS[model], depth=DEPTH), experts, (objective,), drop_path=DROP)
    freeze(task, trainable)
    return train_alone(task, OPTIM, [step_batch(mix, step, 0, 1, depth=DEPTH) for step in range(1, STEPS + 1)])


def pipelined(cases: list[Case]) -> list[Trained]:
    return [one_pipelined(case) for case in cases]


def one_pipelined(case: Case) -> Trained:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.mesh import create_mesh
    from pretrain.parallel.pipeline import build_pipeline_engine
    from pretrain.parallel.tensor import parallel_layers
    from pretrain.tasks.pipeline import PipelineTask, pipeline_bounds

    mesh, model = create_mesh(case.parallel), replace(MODELS[case.model], depth=DEPTH)
    layout = step_layout(case.mix, mesh.data.size * case.accumulation)
    options: dict[str, Any] = {"drop_path": DROP, "checkpointing": case.checkpointing}
    bounds = pipeline_bounds(model, (case.objective,), layout, case.parallel.pipe, checkpointing=case.checkpointing)
    options |= {"layout": layout, "bounds": bounds, "stage": mesh.pipe.rank}
    torch.manual_seed(0)
    part = PipelineTask(model, case.experts, (case.objective,), parallel_layers(mesh), **options)
    freeze(part, case.trainable)
    sizes = {"micro": layout.sequences, "accumulation": case.accumulation, "world": mesh.data.size}
    config = load_ds_config(CONFIGS / case.ds, **sizes, clip=OPTIM.clip)
    make_optimizer = partial(build_optimizer, optim=OPTIM)
    engine = build_pipeline_engine(part, case.parallel, make_optimizer, schedule(OPTIM, STEPS), config)
    return train_on_ranks(engine, mesh, partial(step_batch, case.mix, depth=DEPTH), STEPS)


def check(name: str, case: Case, ranks: list[Trained]) -> None:
    """Against one process in fp32. The bf16 cases differ by what bf16 rounds."""
    reports, norms, weights = plain(case)
    loose = case.ds == BF16
    assert max(norms) > OPTIM.clip, f"{name}: clipping must have been active"
    for step, (got, want) in enumerate(zip(mean_reports(ranks), reports, strict=True)):
        for rank in ranks:
            assert rank.reports[step].keys() == want.keys(), name
            assert rank.norms[step] == pytest.approx(norms[step], rel=1e-2 if loose else 1e-5), f"{name}: {step}, norm"
        for key, value in want.items():
            each = [rank.reports[step][key] for rank in ranks]
            for later, first in zip(each[len(each) // case.parallel.pipe :], each, strict=False):
                assert later == first, f"{name}: the stages do not report the same {key}"
            # A mean over micro-batches of a mean over targets: only losses weigh every sequence alike.
            near = (3e-3 if loose else 1e-6) if key.startswith("loss") else 0.15
            assert got[key] == pytest.approx(value, abs=near), f"{name}: step {step + 1}, {key}"
    state = ranks[0].weights
    assert state.keys() == weights.keys(), name
    for key, value in weights.items():
        error = (state[key] - value).abs().max()
        assert error <= (3e-3 if loose else 1e-6), f"{name}: {key} is off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize(("cases", "ranks"), [(TWO_RANKS, 2), (FOUR_RANKS, 4)], ids=["two ranks", "four ranks"])
def test_pipe_stages_with_data_and_tensor_ranks_equal_one_device(cases, ranks):
    runs = run_ranks(pipelined, ranks, list(cases.values()), timeout=240)
    for (name, case), *own in zip(cases.items(), *runs, strict=True):
        check(name, case, own)
