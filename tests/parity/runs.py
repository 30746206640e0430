"""A cell of the parity matrix on its ranks, the same on one dense process, and how far they are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pretrain.batch import Batch, Kinds
from pretrain.optim import build_optimizer
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.parity.cells import FIRST, LEGAL, OPTIM, STEPS, Cell, legal_cells
from tests.parity.passes import MARGIN, PassCell, pass_cells
from tests.parity.published import PublishedCell, dense_of, first_steps, published_cells, tensor_cells
from tests.step_batches import (
    DROP,
    EXPERTS,
    Mix,
    Trained,
    freeze,
    mean_reports,
    step_batch,
    step_layout,
    train_alone,
    train_on_ranks,
)

AnyCell = Cell | PassCell | PublishedCell
# The rows of the table.
ROWS: dict[str, list[AnyCell]] = {str(topology): [*legal_cells(topology)] for topology in LEGAL}
ROWS |= {cells[0].row: [*cells] for zero, passes in product(range(4), (2, 3)) for cells in [pass_cells(zero, passes)]}
ROWS |= {cells[0].row: [*cells] for zero in range(4) for cells in [published_cells(zero)]}
ROWS |= {cell.row: [cell] for cell in tensor_cells()}


class Apart(NamedTuple):
    """How far two runs are from each other."""

    loss: float  # largest difference in any step, also of the losses by kind
    norm: float  # relative: root mean square over the steps
    norm_once: float  # and in the worst of them
    weights: float  # largest difference at the end, of what is trained: apart() holds what is frozen to the bit
    way: float  # distance of the two final models / the distance that training went: no standstill could meet that


# One dense process in bf16 is itself up to 3.2e-3 from one in fp32 in the norm of a single step (benchmarks/parity.py).
# AdamW moves a weight by about the rate at most, and the rates of OPTIM's steps sum up to 5e-4: two runs whose fp32
# masters began alike are no more than twice that apart. Masters rounded to bf16 would be, where weights are near 1.
TOLERANCES = {"fp32": Apart(1e-6, 1e-6, 1e-6, 1e-6, 1e-4), "bf16": Apart(3e-3, 3e-3, 6e-3, 1e-3, 0.1)}


# ---- one process


def dense(cell: AnyCell, precision: str = "fp32", steps: int = STEPS) -> tuple[Trained, dict[str, Tensor]]:
    """The cell on one process without DeepSpeed, Megatron, checkpointing or accumulation, and the weights that it began
    with."""
    if isinstance(cell, PublishedCell):
        return dense_of(cell.kind)
    recipe, stage = cell.recipe()
    return _dense(recipe.model, stage.objectives, stage.trainable, cell.mix, cell.seed, precision, steps)


@cache
def _dense(model: Any, objectives: Any, trainable: tuple[str, ...], mix: Mix, seed: int, precision: str, steps: int):
    torch.manual_seed(0)
    task = PretrainTask(model, EXPERTS, objectives, drop_path=DROP)
    freeze(task, trainable)
    start = {name: value.clone() for name, value in task.state_dict().items()}
    draws = {objective.name: objective.draws for objective in objectives}
    batches = [step_batch(mix, seed + step, 0, 1, draws=draws) for step in range(1, steps + 1)]
    return train_alone(task, OPTIM, batches, precision, of=STEPS), start


# ---- ranks


def train_cells(cells: list[tuple[AnyCell, Path, int]], sabotage: str = "") -> list[Trained]:
    """On every rank of the cells' one topology, each with its DeepSpeed JSON and its number of steps."""
    from pretrain.parallel.engine import init_distributed
    from pretrain.parallel.mesh import create_mesh

    init_distributed()
    mesh = create_mesh(cells[0][0].topology.parallel)
    return [_train(cell, str(ds), steps, mesh, sabotage) for cell, ds, steps in cells]


def _train(cell: AnyCell, ds: str, steps: int, mesh: Any, sabotage: str) -> Trained:
    """As run/build.py builds it, with made-up batches."""
    from pretrain.optim import schedule
    from pretrain.parallel.engine import build_engine, partitioned_init
    from pretrain.parallel.mesh import mpu_of
    from pretrain.parallel.pipeline import build_pipeline_engine
    from pretrain.parallel.tensor import parallel_layers
    from pretrain.parallel.unfreezing import Unfreezing
    from pretrain.run.build import build_part, build_task, stage_ds_config

    recipe, stage = cell.recipe()
    config, layers = stage_ds_config(ds, recipe, stage), parallel_layers(mesh)
    mpu = mpu_of(mesh)
    if sabotage == "no mpu":
        mpu = None
        config["train_batch_size"] *= mesh.tensor.size  # or DeepSpeed would notice
    if sabotage == "no clipping":
        config["gradient_clipping"] = 1e30
    make_optimizer, factor, waiting = partial(build_optimizer, optim=OPTIM), schedule(OPTIM, STEPS), dict[str, int]()
    if mesh.pipe.size > 1:
        part = build_part(recipe, stage, mesh, layers, step_layout(cell.mix, mesh.data.size * cell.accumulation))
        engine = build_pipeline_engine(part, stage.parallel, make_optimizer, factor, config)
    else:
        task = build_task(recipe, stage, Path(), layers, partitioned_init(config, mpu))
        waiting = first_steps(task, stage)
        engine = build_engine(task, make_optimizer(task, first_steps=waiting), factor, config, mpu)
    unfreezing = Unfreezing(engine, waiting)
    if sabotage == "one rank's gradients" and mesh.data.rank == 1:
        for value in engine.module.parameters():
            value.register_hook(lambda grad: 1.001 * grad)
    if sabotage == "a pass without gradient":
        engine.module.encoder.register_forward_hook(_every_second_detached())

    def micro_batch(step: int, part: int, parts: int) -> Batch:
        if isinstance(cell, PublishedCell):
            unfreezing.begin_step()  # once: they do not accumulate
            return cell.batch(step, part, parts)
        return step_batch(cell.mix, cell.seed + step, part, parts, draws=stage.draws)

    return train_on_ranks(engine, mesh, micro_batch, steps)


def _every_second_detached() -> Callable[..., Kinds]:
    calls = count()
    return lambda module, inputs, kinds: Kinds(*(kind.detach() for kind in kinds)) if next(calls) % 2 else kinds


# ---- both


def compare(
    cells: Sequence[AnyCell], folder: Path, sabotage: str = "", *, sooner: bool = False
) -> dict[AnyCell, Apart]:
    """Runs cells of one topology and says how far each is from one dense process. `sooner`: those that accumulate, and
    so have four passes a step, end after their first steps."""
    steps = [FIRST if sooner and cell.accumulation > 1 else STEPS for cell in cells]
    work = [(cell, cell.write_json(folder), some) for cell, some in zip(cells, steps, strict=True)]
    ranks = run_ranks(train_cells, cells[0].topology.world, work, sabotage, timeout=280)
    return {cell: apart(cell, [runs[i] for runs in ranks], steps[i]) for i, cell in enumerate(cells)}


def apart(cell: AnyCell, ranks: list[Trained], steps: int = STEPS) -> Apart:
    """Asserts that the run is a test of something (clipping was active in every step, training moved the weights
    further than the tolerance), and that what is frozen stood still to the bit."""
    (reports, norms, weights), start = dense(cell, steps=steps)
    margin = min(report.get("margin", MARGIN) for report in reports)
    assert margin >= MARGIN, f"{cell}: rounding may draw another text: {margin}"
    assert min(norms) > OPTIM.clip, f"{cell}: clipping must have been active: {norms}"
    state = ranks[0].weights
    assert state.keys() == weights.keys(), f"{cell}: {state.keys() ^ weights.keys()}"
    assert all(one.keys() == reports[0].keys() for run in ranks for one in run.reports), str(cell)
    moved = {name for name in weights if not torch.equal(weights[name], start[name])}
    dtype = torch.bfloat16 if cell.precision == "bf16" else torch.float32
    for name in weights.keys() - moved:
        assert torch.equal(state[name].to(dtype), start[name].to(dtype)), f"{cell}: {name} must not move"
    furthest = _most((weights[name] - start[name]).abs().max() for name in moved)
    assert furthest > 3e-4, f"{cell}: training moved no weight by more than {furthest:.1e}"
    pairs = zip(mean_reports(ranks), reports, strict=True)
    off = [own[name] - want[name] for own, want in pairs for name in want if name.startswith("loss")]
    relative = [torch.tensor(rank.norms).double() / torch.tensor(norms).double() - 1 for rank in ranks]
    return Apart(
        loss=_most(abs(each) for each in off),
        norm=_most(each.square().mean().sqrt() for each in relative),
        norm_once=_most(each.abs().max() for each in relative),
        weights=_most((state[name] - weights[name]).abs().max() for name in moved),
        way=_distance(state, weights, moved) / _distance(weights, start, moved),
    )


def _most(values: Iterable[float | Tensor]) -> float:
    """The largest, and nan if one of them is."""
    return float(torch.tensor([float(value) for value in values]).max())


def _distance(one: dict[str, Tensor], other: dict[str, Tensor], names: set[str]) -> float:
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in names) ** 0.5


def failures(cells: dict[AnyCell, Apart]) -> list[str]:
    """One line for each cell that is further off than its precision allows."""
    said = []
    for cell, values in cells.items():
        over = [
            f"{name} {value:.1e} > {most:.0e}"
            for name, value, most in zip(Apart._fields, values, TOLERANCES[cell.precision], strict=True)
            if not value <= most  # a nan is no agreement
        ]
        said += [f"{cell}: {', '.join(over)}"] if over else []
    return said
