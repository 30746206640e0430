"""A trained stage -> its evaluations: eval.json and, for the report, samples.json with pictures."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain import command
from pretrain.checkpoint.save import newest_weights
from pretrain.checkpoint.weights import WEIGHTS, load_handover, weights_digest
from pretrain.config import Recipe, Stage, to_json
from pretrain.data.shards.reader import load_manifest
from pretrain.distributed import device
from pretrain.evals.trained import Trained
from pretrain.files import write_json
from pretrain.models.visual_tokenizer.teachers import PixelTeacher
from pretrain.recipes import built_in_recipes, load_recipe
from pretrain.run.build import build_task
from pretrain.run.directory import RECIPE, read_json, read_recipe
from pretrain.run.image_targets import image_targets, load_visual_tokenizer
from pretrain.run.inputs import evaluation_loader, text_tokenizer

log = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True)
    log.setLevel(logging.INFO)
    return command.run(lambda: run(args), state="an earlier evaluation is intact")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command.make_parser("pretrain.evaluate", __doc__, "--run-dir runs/quickstart --stage retrieval")
    parser.add_argument("--run-dir", required=True, type=Path)
    parser.add_argument("--stage", required=True)
    parser.add_argument(
        "--recipe", help="a name or a .py file, which is code (default: the built-in recipe that trained it)"
    )
    parser.add_argument("--weights", type=Path, help="instead of the stage's own: a weights.safetensors")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in training")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    directory = args.run_dir / args.stage
    name, settings = _trained_with(directory, args)
    recipe, stage = load_recipe(name, args.stage, settings)
    step, weights = _weights(directory, stage, args.weights)
    digest = weights_digest(weights)
    # Beside the stage's own evaluation when the weights are others.
    path = directory / (f"eval-{digest[:8]}.json" if args.weights else "eval.json")
    look = getattr(stage.transform, "evaluation", None)
    asked = hashlib.sha256(json.dumps([to_json(stage.evals), look], sort_keys=True).encode()).hexdigest()[:16]
    done = read_json(path)
    if done.get("weights") == digest and done.get("evals") == asked:
        log.info("%s: evaluated before; nothing to do", args.stage)
        return
    task = build_task(recipe, stage, args.run_dir)
    handover = load_handover(task, weights)
    if handover.missing:
        raise ValueError(f"{weights} lacks {handover.missing[0]}; it is not this stage's: give the stage that wrote it")
    task.to(device()).eval()
    trained = trained_stage(recipe, stage, args.run_dir, directory, task)
    metrics: dict[str, Any] = {"step": step, "weights": digest, "evals": asked}
    if not stage.evals:
        log.warning("%s: the recipe names no evals for this stage", args.stage)
    samples: dict[str, list] = {}
    for evaluation in stage.evals:
        values, shown = evaluation.run(trained)
        metrics |= values
        samples |= shown
    for name, value in metrics.items():
        if isinstance(value, float):
            log.info("%s: %-40s %.2f", args.stage, name, value)
    directory.mkdir(parents=True, exist_ok=True)
    if not args.weights:
        write_json(directory / "samples.json", samples)
    write_json(path, metrics)


def _weights(directory: Path, stage: Stage, given: Path | None) -> tuple[int | None, Path]:
    """What to evaluate, and its step where that is known: what was asked for, else the finished stage, else the newest
    complete checkpoint."""
    if given is not None:
        return None, given
    if (finished := directory / WEIGHTS).is_file():
        return stage.steps, finished
    if (newest := newest_weights(directory / "checkpoints")) is not None:
        log.info("the stage is not finished; evaluating its checkpoint of step %d", newest[0])
        return newest
    raise ValueError(f"{directory} has neither weights nor a complete checkpoint; train the stage, or give --weights")


def trained_stage(recipe: Recipe, stage: Stage, run_dir: Path, directory: Path, task: nn.Module) -> Trained:
    """The task with everything that evaluations ask for."""
    return Trained(
        task=task,
        device=device(),
        directory=directory,
        loader=lambda mix, counts, masking: evaluation_loader(recipe, stage, mix, counts, masking),
        with_codes=image_targets(recipe, stage, run_dir, device()),
        draw_codes=_painter(recipe, stage, run_dir, task),
        samples_of=lambda source: sum(load_manifest(source.shards).counts),
        masking=stage.masking,
        text=text_tokenizer(recipe, stage),
    )


def _painter(recipe: Recipe, stage: Stage, run_dir: Path, task: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Codes -> pictures, where the visual tokenizer learned pixels; None where it learned features."""
    tokenizer: Any
    if hasattr(task, "tokenizer"):
        tokenizer = task.tokenizer
    elif stage.visual_tokenizer is not None:
        tokenizer = load_visual_tokenizer(recipe, stage, run_dir).to(device())
    else:
        return None
    if tokenizer.cfg.distill != "mse":
        return None
    teacher = PixelTeacher(tokenizer.cfg.patch_size)

    @torch.no_grad()
    def draw(codes: Tensor) -> Tensor:
        picture = teacher.picture(tokenizer.decode_codes(codes))
        return nn.functional.interpolate(picture.float(), size=tokenizer.cfg.image_size, mode="nearest").byte()

    return draw


def _trained_with(directory: Path, args: argparse.Namespace) -> tuple[str, list[str]]:
    """The recipe's name and settings: as given, else as pretrain.train noted them. A file that recipe.json names is
    not run: whoever evaluates somebody else's directory would execute their code."""
    noted = read_recipe(directory).get("command", {})
    noted_name, settings = (noted.get("recipe"), noted.get("set", [])) if isinstance(noted, dict) else (None, [])
    name = args.recipe or str(noted_name)
    if args.recipe is None:
        if not isinstance(noted_name, str):
            raise ValueError(
                f"{directory} holds no recipe.json of a training run; train the stage first, or give --recipe"
            )
        if name not in built_in_recipes():
            raise ValueError(
                f"{directory / RECIPE} names {name!r}, which is no built-in recipe but a file of code, and is not run "
                "unasked; if you trust it, give it as --recipe FILE"
            )
    if not isinstance(settings, list) or not all(isinstance(setting, str) for setting in settings):
        raise ValueError(
            f"{directory / RECIPE}: command.set={settings!r} is no list of KEY=VALUE; train the stage again"
        )
    return name, [*settings, *args.set]


if __name__ == "__main__":
    sys.exit(main())
