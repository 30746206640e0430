"""What the tests of pipeline parallelism run: one case on the ranks of a pipeline, and the same on one device."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import Batch, Layout
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim, build_optimizer, learning_rate, schedule
from pretrain.parallel.sizes import Parallel
from pretrain.tasks.pretrain import PretrainTask
from tests.step_batches import step_batch, step_layout

CONFIGS = Path(__file__).parents[2] / "ds_configs"
MODEL = MultiwayConfig(
    dim=32,
    depth=4,
    heads=2,
    ffn_dim=64,
    image_size=16,
    patch_size=4,
    vocab_size=64,
    image_codes=24,
    max_text_len=10,
    fusion_layers=1,
    init_std=0.1,
    drop_path=0.3,
)
OPTIM = Optim(lr=1e-3, warmup_steps=2, weight_decay=0.05, clip=0.5)
STEPS = 5
MASKED, TIED = MaskedData(), MaskedData(tied_text_head=True)
PP2, PP4, TP2_PP2 = Parallel(pipe=2), Parallel(pipe=4), Parallel(tensor=2, pipe=2)
# Images, pairs and texts of a global batch.
ALL, IMAGES, PAIRS, TEXTS = (8, 8, 8), (8, 0, 0), (0, 8, 0), (0, 0, 8)


@dataclass(frozen=True)
class Case:
    """A run of STEPS steps."""

    mix: tuple[int, int, int] = ALL
    accumulation: int = 1
    model: MultiwayConfig = MODEL
    experts: tuple[str, ...] = ("vision", "language", "fusion")
    objective: MaskedData = MASKED
    trainable: tuple[str, ...] = ("*",)
    ds: str = "zero1.json"
    parallel: Parallel = PP2


def freeze(task: torch.nn.Module, case: Case) -> None:
    for name, value in task.named_parameters():
        value.requires_grad_(any(fnmatch(name, pattern) for pattern in case.trainable))


def layout_of(case: Case, parts: int) -> Layout:
    return step_layout(case.mix, parts)


def micro_batch(case: Case, step: int, part: int, parts: int) -> Batch:
    """Part `part` of `parts` equal ones of the step's global batch."""
    return step_batch(case.mix, step, part, parts, depth=case.model.depth, vocab=case.model.vocab_size)


def plain(case: Case) -> tuple[list[dict[str, float]], list[float], dict[str, Tensor]]:
    """Reports, norms and final weights of one process without DeepSpeed, in fp32."""
    torch.manual_seed(0)
    task = PretrainTask(case.model, case.experts, (case.objective,))
    freeze(task, case)
    optimizer = build_optimizer(task, OPTIM)
    reports, norms = [], []
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        report = task(micro_batch(case, step, 0, 1))
        optimizer.zero_grad()
        report["loss"].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(task.parameters(), OPTIM.clip).item())
        optimizer.step()
        reports.append({name: value.item() for name, value in report.items()})
    return reports, norms, task.state_dict()


def pipelined(cases: list[Case]) -> list[Any]:
    return [one_pipelined(case) for case in cases]


def one_pipelined(case: Case) -> tuple[list[dict[str, float]], list[float], dict[str, Tensor], list[str]]:
    """As `plain`, on this rank, and the names of the parameters of its stage."""
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import gradient_norm
    from pretrain.parallel.mesh import create_mesh
    from pretrain.parallel.pipeline import build_pipeline_engine, pipeline_step
    from pretrain.parallel.state import full_state
    from pretrain.parallel.tensor import parallel_layers
    from pretrain.tasks.pipeline import PipelineTask, pipeline_bounds

    mesh = create_mesh(case.parallel)
    parts = mesh.data.size * case.accumulation
    layout = layout_of(case, parts)
    bounds = pipeline_bounds(case.model, (case.objective,), layout, case.parallel.pipe)
    torch.manual_seed(0)
    layers = parallel_layers(mesh)
    part = PipelineTask(
        case.model, case.experts, (case.objective,), layers, layout=layout, bounds=bounds, stage=mesh.pipe.rank
    )
    freeze(part, case)
    sizes = {"micro": layout.sequences, "accumulation": case.accumulation, "world": mesh.data.size}
    config = load_ds_config(CONFIGS / case.ds, **sizes, clip=OPTIM.clip)
    make_optimizer = partial(build_optimizer, optim=OPTIM)
    engine = build_pipeline_engine(part, case.parallel, make_optimizer, schedule(OPTIM, STEPS), config)
    reports, norms = [], []
    for step in range(1, STEPS + 1):
        batches = [
            micro_batch(case, step, mesh.data.rank * case.accumulation + i, parts) for i in range(case.accumulation)
        ]
        ends = mesh.pipe.rank in (0, mesh.pipe.size - 1)
        report = pipeline_step(engine, batches if ends else [])
        reports.append({name: value.item() for name, value in report.items()})
        norms.append(gradient_norm(engine))
    return reports, norms, full_state(engine, mesh), [name for name, _ in part.named_parameters()]
