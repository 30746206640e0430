"""How a step's cost grows with the resolution, the vocabulary and the experts: counted, and measured here.

    python -m benchmarks.growth --depth 2 --out benchmarks/results/growth.json

Each cell changes one thing of BEiT-3 base (224 pixels, 64010 words, the paper's experts) at a smaller depth: forward
and backward of masked data modeling on one image, one pair and one text of full length. `counted` is the FLOPs that
such a step computes, heads included, by pretrain.flops; `seconds` the median of CPU seconds on one thread, in turns
with the first cell; both also as multiples of the first cell's. Parameters are of the whole depth. For shards and
start-up see benchmarks.order.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.compare.__main__ import OBJECTIVE, executed, make_one
from benchmarks.record import machine
from pretrain import command
from pretrain.batch import Batch, Layout
from pretrain.command import about, write
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.sizes import BEIT3_BASE
from pretrain.tasks.pretrain import PretrainTask

ALL = ("vision", "language", "fusion")
PAIR_LEN, TEXT_LEN = 64, 196


@dataclass(frozen=True)
class Cell:
    name: str
    cfg: MultiwayConfig
    experts: tuple[str, ...] = ALL


def cells(base: MultiwayConfig) -> list[Cell]:
    """The first is what the others are compared with."""
    apart = replace(base, attention="per_modality", fusion_layers=0)
    return [
        Cell("base", base),
        *(Cell(f"{side} pixels", replace(base, image_size=side)) for side in (384, 768)),
        *(Cell(f"{words} words", replace(base, vocab_size=words)) for words in (8000, 128_000)),
        Cell("no fusion experts", replace(base, fusion_layers=0), ALL[:2]),
        Cell("fusion experts in every block", replace(base, fusion_layers=base.depth)),
        Cell("attention per modality", apart, ALL[:2]),
    ]


class Trial:
    """One cell at `depth`, and the times of its steps."""

    def __init__(self, cell: Cell, depth: int):
        shallow = replace(cell.cfg, depth=depth, fusion_layers=min(cell.cfg.fusion_layers, depth))
        self.name, self.seconds = cell.name, list[float]()
        with torch.device("meta"):
            whole = PretrainTask(cell.cfg, cell.experts, (OBJECTIVE,))
        self.parameters = sum(value.numel() for value in whole.parameters())
        torch.manual_seed(0)
        self.task: nn.Module = PretrainTask(shallow, cell.experts, (OBJECTIVE,))
        layout = Layout(1, 1, 1, shallow.patches, PAIR_LEN, TEXT_LEN)
        self.batch: Batch = make_one(shallow, layout, full_length=True)
        self.counted = executed(shallow, self.batch, self.task, cell.experts)

    def step(self) -> None:
        begin = time.process_time()
        self.task(self.batch)["loss"].backward()
        self.task.zero_grad()
        self.seconds.append(time.process_time() - begin)


def measure(base: MultiwayConfig, depth: int, rounds: int) -> dict[str, Any]:
    whole, figures = cells(base), {}
    first = Trial(whole[0], depth)
    for cell in whole:
        first.seconds.clear()
        # Two at a time: all of them would need several gigabytes.
        trial = first if cell is whole[0] else Trial(cell, depth)
        for _ in range(rounds + 1):  # the first one warms up
            for each in {first, trial}:
                each.step()
        ratios = [a / b for a, b in zip(trial.seconds[1:], first.seconds[1:], strict=True)]
        figures[trial.name] = {
            "parameters": trial.parameters,
            "counted_gflops": round(trial.counted / 1e9, 3),
            "counted_times": round(trial.counted / first.counted, 2),
            "seconds": round(statistics.median(trial.seconds[1:]), 3),
            "times": round(statistics.median(ratios), 2),
        }
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = command.make_parser("benchmarks.growth", __doc__, "--depth 1 --rounds 1")
    parser.add_argument("--depth", type=int, default=2, help="blocks that are computed (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each cell (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    for name in ("depth", "rounds"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is below 1; use 1 or more")
    torch.set_num_threads(1)
    facts: dict[str, Any] = about("benchmarks.growth", argv) | machine("torch") | {"depth": args.depth}
    write(facts | {"cells": measure(BEIT3_BASE, args.depth, args.rounds)}, args.out)


if __name__ == "__main__":
    sys.exit(main())
