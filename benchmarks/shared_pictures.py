"""A step of BLIP and ALBEF whose passes share a picture's rows, beside one that encodes the picture for each pass.

    python -m benchmarks.shared_pictures --rounds 20 --out benchmarks/results/shared_pictures.json

The two take turns in one process on the same batch, forward and backward without an optimizer. CPU time of one thread,
which other work on the machine hardly changes; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.record import machine
from pretrain import command
from pretrain.batch import BOS, EOS, Batch, make_batch
from pretrain.config import Recipe, Stage
from pretrain.data.mixture import micro_layout
from pretrain.layers import PLAIN
from pretrain.recipes import load_recipe

RECIPES = ("tiny_blip", "tiny_albef")


def random_batch(recipe: Recipe, stage: Stage, patches: int) -> Batch:
    """A batch of the stage's layout, with every text at its full length."""
    layout = micro_layout(stage.mix, stage.batch.counts(), patches, 1)
    generator, size = torch.Generator().manual_seed(0), recipe.model_of(stage).image_size

    def words(count: int, length: int) -> torch.Tensor:
        ids = torch.randint(10, 300, (count, length), generator=generator)
        ids[:, :1], ids[:, -1:] = BOS, EOS
        return ids

    count = layout.images + layout.pairs
    return make_batch(
        layout,
        images=torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator),
        pair_tokens=words(layout.pairs, layout.pair_len),
        text_tokens=words(layout.texts, layout.text_len),
        draws={"matching": torch.rand(layout.sequences, 1, generator=generator)},
    ).indexed()


def step_of(recipe: Recipe, stage: Stage, *, shared: bool) -> Callable[[Batch], float]:
    """A function that takes a step, forward and backward, and returns its loss."""
    model = recipe.model_of(stage)
    torch.manual_seed(0)
    with patch.object(type(model), "shares_pictures", shared):
        task = stage.task.build(model, stage, PLAIN, None)

    def step(batch: Batch) -> float:
        task.zero_grad()
        loss = task(batch)["loss"]
        loss.backward()
        return float(loss.detach())

    return step


def compare(name: str, rounds: int) -> dict[str, Any]:
    recipe, stage = load_recipe(name, "fusion", ["init_from=None"])
    model = recipe.model_of(stage)
    batch = random_batch(recipe, stage, (model.image_size // model.patch_size) ** 2)
    steps = {way: step_of(recipe, stage, shared=way == "shared") for way in ("shared", "each")}
    losses = {way: step(batch) for way, step in steps.items()}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for _ in range(rounds):
        for way, step in steps.items():
            start = time.process_time()
            step(batch)
            seconds[way].append(time.process_time() - start)
    ratios = [each / shared for each, shared in zip(seconds["each"], seconds["shared"], strict=True)]
    pairs = stage.batch.total
    return {
        "recipe": name,
        "times_as_fast": round(statistics.median(ratios), 3),
        "samples_per_cpu_s_shared": round(pairs / statistics.median(seconds["shared"]), 1),
        "samples_per_cpu_s_each": round(pairs / statistics.median(seconds["each"]), 1),
        "largest_difference_of_losses": abs(losses["shared"] - losses["each"]),
    }


def measure(args: argparse.Namespace, arguments: list[str] | None) -> None:
    os.environ.setdefault("DATA", "unused")
    rows = [compare(name, args.rounds) for name in args.recipes]
    command.write(
        {"rows": rows, **command.about("benchmarks.shared_pictures", arguments), **machine("torch")}, args.out
    )


def main(arguments: list[str] | None = None) -> int:
    parser = command.make_parser("benchmarks.shared_pictures", __doc__, "--rounds 20")
    parser.add_argument("--rounds", type=int, default=20, help="in turns (%(default)s)")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    args = parser.parse_args(arguments)
    return command.run(lambda: measure(args, arguments), state="nothing was kept")


if __name__ == "__main__":
    sys.exit(main())
