"""Lists, before anything is built, every way to spread a stage over GPUs: why it is illegal or too large, or how long a
step would take on paper.

    python -m pretrain.plan --recipe beit3_giant --stage pretrain --gpus 64 --gpu a100-80g

A layout is a DeepSpeed JSON of ds_configs/ (ZeRO stage, precision, offload) with sizes for tensor, pipe and sequence
ranks, batch.accumulation and activation_checkpointing. Memory is counted (memory.py; a test holds it to 5 % of a
tiny run's bytes). Time comes from a model, whose constants are in hardware.py: it ranks layouts and promises nothing.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from tqdm import tqdm

from pretrain.batch import Layout
from pretrain.command import about, make_parser, run, write
from pretrain.config import Stage
from pretrain.parallel.ds_config import load_ds_config
from pretrain.parallel.legal import problems
from pretrain.parallel.sizes import Parallel
from pretrain.plan.hardware import FRAGMENTS, GIB, GPUS, OUTSIDE
from pretrain.plan.memory import Cell, Memory, peak_memory
from pretrain.plan.model import Planned, micro_batch_layout, planned, teachers
from pretrain.plan.page import page
from pretrain.plan.time import FULL, Cluster, Lengths, Time, step_time, whole_stage
from pretrain.recipes import load_recipe

CONFIGS = Path(__file__).parents[2] / "ds_configs"
SIZES = (1, 2, 4, 8, 16)  # numbers of tensor, pipe and sequence ranks that are tried


class Row(NamedTuple):
    """A legal layout."""

    name: str  # of the DeepSpeed JSON
    cell: Cell
    memory: Memory
    time: Time | None  # None: it does not fit


class Plan(NamedTuple):
    """All layouts of a stage on a cluster, sorted."""

    planned: Planned
    cluster: Cluster
    fits: list[Row]  # the fastest first
    too_large: list[Row]  # what is nearest to fitting first
    illegal: dict[str, tuple[int, str]]  # reason without its numbers: how many layouts, one whole sentence


def make_plan(
    planned: Planned,
    cluster: Cluster,
    paths: list[Path],
    checkpointing: tuple[int, ...] = (0, 1, 4),
    lengths: Lengths = FULL,
) -> Plan:
    """Tries every layout with one of the DeepSpeed JSONs `paths`; `checkpointing`: the values of
    activation_checkpointing that are tried. Raises ValueError, with a reason, where no layout is legal."""
    fits, too_large, illegal = [], [], defaultdict[str, list[str]](list)
    usable = (cluster.gpu.memory - OUTSIDE) * (1 - FRAGMENTS)
    cells = list(_cells(planned, cluster, paths, checkpointing, illegal))
    for name, cell in tqdm(cells, desc="layouts", unit="", disable=None, leave=False):
        memory = peak_memory(planned, cell)
        if memory.total <= usable:
            fits.append(Row(name, cell, memory, step_time(planned, cell, cluster, lengths)))
        else:
            too_large.append(Row(name, cell, memory, None))
    reasons = {reason: (len(each), each[0]) for reason, each in illegal.items()}
    if not fits and not too_large:
        _, sentence = next(iter(reasons.values()))  # the first one tried has no parallel ranks, and is the plainest
        raise ValueError(f"no layout is legal on {cluster.gpus} GPUs: {sentence}")
    fits.sort(key=lambda row: (row.time.step, row.memory.total) if row.time else (0.0, 0.0))
    too_large.sort(key=lambda row: row.memory.total)
    return Plan(planned, cluster, fits, too_large, dict(sorted(reasons.items(), key=lambda item: -item[1][0])))


def _cells(
    planned: Planned, cluster: Cluster, paths: list[Path], checkpointing: tuple[int, ...], illegal: dict[str, list[str]]
) -> Iterator[tuple[str, Cell]]:
    """The legal layouts, each with the name of its DeepSpeed JSON. Adds the others' reasons to `illegal`."""
    stage, counts = planned.stage, planned.stage.batch.counts()
    sizes = [s for s in SIZES if s <= cluster.gpus]
    for path, tensor, pipe, sequence in product(paths, sizes, sizes, sizes):
        if pipe > 1 and sequence > 1:
            continue  # Parallel refuses it
        parallel = Parallel(tensor, pipe, sequence)
        for accumulation in _accumulations(planned, cluster.gpus // parallel.model):
            copies = max(cluster.gpus // (tensor * pipe), 1)
            micro = max(stage.batch.total // (copies * accumulation), 1)
            config = load_ds_config(path, micro=micro, accumulation=accumulation, world=copies, clip=stage.optim.clip)
            reasons = problems(
                parallel,
                world=cluster.gpus,
                config=config,
                counts=counts,
                accumulation=accumulation,
                model=planned.sizes,
                classes=stage.head_classes,
                node=min(cluster.node, cluster.gpus),
            )
            reasons += _objections(stage, parallel, accumulation)
            if not reasons and tensor > cluster.node:
                reasons = [f"parallel.tensor={tensor} is wider than a node of {cluster.node} GPUs, and would be slow"]
            for reason in reasons:
                illegal[re.sub(r"\d+( or \d+)?", "N", reason)].append(reason)
            if reasons:
                continue
            data = cluster.gpus // parallel.model
            layout = micro_batch_layout(planned, data * accumulation)
            for every in checkpointing:
                yield path.stem, Cell(config, parallel, data, layout, accumulation, every)


def _objections(stage: Stage, parallel: Parallel, accumulation: int) -> list[str]:
    """What the stage's objectives say against this layout."""
    batch = replace(stage.batch, accumulation=accumulation)
    # replace(stage, ...) would raise for a layout that its objectives refuse.
    changed = SimpleNamespace(**vars(stage) | {"parallel": parallel, "batch": batch})
    return [problem for objective in stage.objectives for problem in objective.problems(changed)]


def _accumulations(planned: Planned, data: int) -> list[int]:
    """The accumulations that leave every micro-batch at least one sequence of each kind and that no objective refuses;
    `data`: ranks that work on different data. The recipe's own where the batch cannot be divided among them."""
    stage = planned.stage
    counts = stage.batch.counts().values()
    if not data or any(count % data for count in counts):
        return [stage.batch.accumulation]
    each = [count // data for count in counts]
    possible = [n for n in range(1, min(each) + 1) if all(count % n == 0 for count in each)]
    return [n for n in possible if not _objections(stage, Parallel(), n)]


def report(plan: Plan, top: int, lengths: Lengths = FULL) -> dict[str, Any]:
    """The plan as plain JSON values, with its `top` fastest layouts: memory in GiB, times in seconds, and the bytes
    that one GPU sends in a step."""
    return {
        "what": "counted memory and modelled time; nothing here was measured",
        "parameters": sum(p.real for p in plan.planned.parameters),
        "gpus": plan.cluster.gpus,
        "rows": _rows(plan, lengths),
        "not_counted": _not_counted(plan.planned),
        "layouts": [_row(plan, row) for row in plan.fits[:top]],
        "too_large": len(plan.too_large),
        "nearest_too_large": [_row(plan, row) for row in plan.too_large[:1]],
        "illegal": [{"layouts": count, "example": sentence} for count, sentence in plan.illegal.values()],
    }


def _not_counted(planned: Planned) -> list[str]:
    return [
        f"{knob}={planned.stage.reads[knob]} is no stage of this recipe: each GPU also holds that model in fp32, 4 "
        "bytes a parameter, and runs its forward pass"
        for knob, model in teachers(planned).items()
        if model is None
    ]


def _rows(plan: Plan, lengths: Lengths) -> dict[str, float]:
    """Rows of one step over all GPUs: how many the padded batch has, how many go through the blocks, and the share, 0
    to 1, that does not."""
    layout = micro_batch_layout(plan.planned, 1)
    exist, computed = layout.rows, round(lengths.real(layout).rows)
    return {"exist": exist, "computed": computed, "padding": round(1 - computed / exist, 4)}


def _row(plan: Plan, row: Row) -> dict[str, Any]:
    """A layout as plain JSON values."""
    cell, time = row.cell, row.time
    memory = row.memory._asdict() | {"total": row.memory.total}
    values: dict[str, Any] = {
        "ds": f"ds_configs/{row.name}.json",
        **vars(cell.parallel),
        "data": cell.data,
        "accumulation": cell.accumulation,
        "checkpointing": cell.checkpointing,
        "memory_gib": {k: round(v / GIB, 3) if isinstance(v, int | float) else v for k, v in memory.items()},
    }
    if time is not None:
        whole = whole_stage(plan.planned, cell, plan.cluster, time.step)
        values |= {
            "stage": {name: round(value, 3 if value < 100 else 0) for name, value in whole._asdict().items()},
            "step_s": round(time.step, 4),
            "seconds": {n: round(getattr(time, n), 4) for n in ("compute", "communication", "bubble", "optimizer")},
            "samples_per_s": round(plan.planned.stage.batch.total / time.step, 1),
            "mfu": round(time.mfu(plan.cluster), 4),
            "mfu_real": round(time.mfu_real(plan.cluster), 4),
            "mfu_executed": round(time.mfu_executed(plan.cluster), 4),
            "bubble": round(time.bubble_share, 4),
            "sent_bytes": {kind: round(size) for kind, size in time.sent.items() if size},
        }
    return values


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    for name in ("gpus", "node", "top"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is below 1; use 1 or more")
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    gpu = GPUS[args.gpu]
    if args.network is not None:
        gpu = gpu._replace(network_rate=args.network * 1e9)
    # The stage's own sizes are dropped, since the plan tries all of them.
    stage = replace(stage, parallel=Parallel(), activation_checkpointing=0)
    paths = [Path(p) for p in args.ds] or sorted(CONFIGS.glob("*.json"))
    lengths = _lengths(args, micro_batch_layout(known := planned(recipe, stage), 1))
    plan = make_plan(known, Cluster(gpu, args.gpus, args.node), paths, lengths=lengths)
    facts = about("pretrain.plan", argv) | report(plan, args.top, lengths)
    if not args.json:
        print(page(facts, args))
    write(facts, args.out, show=args.json)


def _lengths(args: argparse.Namespace, layout: Layout) -> Lengths:
    for name, full in (("pair_ids", layout.pair_len), ("text_ids", layout.text_len)):
        mean, option = getattr(args, name), f"--{name.replace('_', '-')}"
        if mean is not None and not full:
            raise ValueError(f"{option}={mean:g}, but the stage has no such texts; leave it out")
        if mean is not None and not 2 <= mean <= full:
            raise ValueError(f"{option}={mean:g} is no mean of texts of 2 to {full} ids; use one of these")
    return Lengths(args.pair_ids, args.text_ids)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    example = "--recipe beit3_giant --stage pretrain --gpus 64 --gpu a100-80g"
    parser = make_parser("pretrain.plan", __doc__, example)
    parser.allow_abbrev = False
    parser.add_argument("--recipe", required=True, help="a name in pretrain/recipes, or a .py file with RECIPE = ...")
    parser.add_argument("--stage", default="pretrain", help="a stage of the recipe (%(default)s)")
    parser.add_argument("--gpus", type=int, required=True, help="all of them")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="a100-80g", help="their kind (%(default)s)")
    parser.add_argument("--node", type=int, default=8, help="GPUs of a node (%(default)s)")
    parser.add_argument("--network", type=float, metavar="GB/S", help="a GPU's share of the network, one direction")
    parser.add_argument(
        "--ds", action="append", default=[], metavar="JSON", help="only this DeepSpeed JSON; repeatable"
    )
    full = "BOS and EOS included: the rest is padding, which is not computed (all are full)"
    parser.add_argument("--pair-ids", type=float, metavar="MEAN", help=f"ids of a pair's text, {full}")
    parser.add_argument("--text-ids", type=float, metavar="MEAN", help="the same of texts seen alone")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the recipe")
    parser.add_argument("--top", type=int, default=10, help="layouts to show (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
