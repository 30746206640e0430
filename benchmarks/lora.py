"""Adapters on a frozen encoder beside full fine-tuning, on the quickstart's retrieval: how much is trained, the memory
that this takes, and the recall that it reaches.

    python -m benchmarks.lora --quickstart runs/quickstart --work runs/lora --out benchmarks/results/lora.json

Trains and evaluates each stage of benchmarks/lora_recipe.py from the quickstart's `fusion`; `full` is the quickstart's
own retrieval, whose figures are read there, unless --steps asks for others. Memory is counted, not measured: fp32
weights, and for what is trained a gradient and two moments, of one rank without ZeRO; activations are about the same
for all rows. The same line goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import machine
from pretrain.command import about, make_parser, run, write
from pretrain.json_files import read_object
from pretrain.layers import PLAIN
from pretrain.recipes import find_recipe
from pretrain.run.directory import read_recipe
from pretrain.run.identity import differences

RECIPE = Path(__file__).with_name("lora_recipe.py")
METRICS = ("retrieval/image_to_text/R@1", "retrieval/text_to_image/R@1")


def sizes(stage_name: str) -> dict[str, Any]:
    """How many parameters the stage's model has and how many of them are trained; MiB of the weights, gradients and
    moments on one rank."""
    recipe = find_recipe(str(RECIPE))
    stage = recipe.stages[stage_name]
    with torch.device("meta"):
        task = stage.task.build(recipe.model_of(stage), stage, PLAIN, None)
    counts = {name: value.numel() for name, value in task.named_parameters()}
    whole, trained = sum(counts.values()), sum(count for name, count in counts.items() if stage.trains(name))
    mib = (4 * whole + 12 * trained) / 2**20
    share = round(100 * trained / whole, 2)
    return {"parameters": whole, "trained": trained, "trained_percent": share, "weights_gradients_moments_mib": mib}


def is_retrieval(finished: Path, name: str) -> bool:
    """Whether the quickstart's retrieval, trained and evaluated, is the recipe's stage `name`: the same settings, by
    other names of the same files."""
    if not (finished / "eval.json").is_file():
        return False
    recipe = find_recipe(str(RECIPE))
    changes = differences(read_recipe(finished)["identity"], recipe, recipe.stages[name])
    return set(changes) <= {"init_from", "text_tokenizer"}


def train(quickstart: Path, work: Path, stage: str, steps: int | None) -> dict[str, Any]:
    """Trains and evaluates the stage, unless that is done -> its METRICS."""
    env = os.environ | {"QUICKSTART": str(quickstart.resolve()), "DATA": str((quickstart / "corpus").resolve())}
    common = ["--recipe", str(RECIPE), "--stage", stage, "--run-dir", str(work)]
    common += ["--set", f"steps={steps}"] if steps else []
    directory = work / stage
    if steps is None and is_retrieval(quickstart / "retrieval", stage):
        directory = quickstart / "retrieval"
    done = directory / "eval.json"
    for module, more in (("train", ["--ds", str(RECIPE.parents[1] / "ds_configs/zero0.json")]), ("evaluate", [])):
        if not done.exists():
            subprocess.run([sys.executable, "-m", f"pretrain.{module}", *common, *more], env=env, check=True)
    figures = read_object(done)
    return {name: figures[name] for name in METRICS}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.lora", __doc__, "--quickstart runs/quickstart --work runs/lora")
    parser.add_argument("--quickstart", type=Path, required=True, metavar="DIR", help="the quickstart's run directory")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for the runs")
    stages = list(find_recipe(str(RECIPE)).stages)
    parser.add_argument("--stages", nargs="*", choices=stages, default=stages, help="rows of the table (all of them)")
    parser.add_argument("--steps", type=int, metavar="N", help="of each stage, instead of the recipe's")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="finished stages stay; run the same command to continue")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    if not (args.quickstart / "fusion" / "weights.safetensors").is_file():
        raise ValueError(f"{args.quickstart} has no finished fusion; run bash launch/quickstart.sh first")
    os.environ.setdefault("DATA", str((args.quickstart / "corpus").resolve()))
    os.environ.setdefault("QUICKSTART", str(args.quickstart.resolve()))
    rows: list[dict[str, Any]] = []
    results = {**about("benchmarks.lora", arguments), **machine("torch", "deepspeed"), "rows": rows}
    for stage in args.stages:
        rows.append({"stage": stage, **sizes(stage), **train(args.quickstart, args.work, stage, args.steps)})
        write(results, args.out)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
