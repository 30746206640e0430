"""A trained stage -> its evaluations: eval.json and, for the report, samples.json with pictures.

An evaluation on other data, or with other settings or weights, is not the stage's own: it goes into eval-NAME.json,
which says what differs, with its pictures in eval-NAME/, and the report shows it apart.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from pretrain import command
from pretrain.checkpoint.save import average_of, newest_weights
from pretrain.checkpoint.weights import LORA, WEIGHTS, load_handover, weights_digest, weights_header
from pretrain.config import Stage
from pretrain.distributed import device
from pretrain.files import write_json
from pretrain.recipes import built_in_recipes, load_recipe
from pretrain.run.build import build_task
from pretrain.run.continuation import inputs_dir
from pretrain.run.directory import RECIPE, read_recipe
from pretrain.run.evaluation import Asked, asked_evaluation
from pretrain.run.labels import check_labels
from pretrain.run.trained import evaluate, said, trained_stage
from pretrain.visible import start_logging

log = logging.getLogger("pretrain")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    start_logging()
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
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as in training, on top of what it was given"
    )
    parser.add_argument(
        "--name",
        default="",
        help="write eval-NAME.json (default: eval.json, or a hash where the evaluation is another)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    directory = args.run_dir / args.stage
    recipe_name, settings = _trained_with(directory, args)
    plain, stage = load_recipe(recipe_name, args.stage, settings)
    recipe = plain
    if args.set:
        recipe, stage = load_recipe(recipe_name, args.stage, [*settings, *args.set])
    inputs = inputs_dir(args.run_dir, read_recipe(directory).get("identity"))
    step, weights = _weights(directory, plain.stages[args.stage], args.weights)
    digest, given = weights_digest(weights), args.weights is not None
    asked = asked_evaluation(directory, args.stage, (recipe, stage), plain, weights=digest, given=given, name=args.name)
    if asked.differs:
        log.info(
            "%s: not the stage's own evaluation (%s), so that it has a file of its own",
            args.stage,
            _first_difference(asked),
        )
    if asked.made:
        log.info("%s: evaluated before; nothing to do (%s)", args.stage, asked.path)
        return
    apart = LORA in weights_header(weights).get("config", {})  # adapters lie apart, as in a checkpoint
    check_labels(stage)
    task = build_task(recipe, stage if apart else replace(stage, lora=None), inputs, trains=False)
    handover = load_handover(task, weights, average=average_of(weights))
    if handover.missing:
        raise ValueError(f"{weights} lacks {handover.missing[0]}; it is not this stage's: give the stage that wrote it")
    task.to(device()).eval()
    metrics, samples = evaluate(stage, trained_stage(recipe, stage, inputs, asked.pictures, task))
    if not stage.evals:
        log.warning("%s: the recipe names no evals for this stage", args.stage)
    for name, value in said(args.stage, metrics).items():
        if isinstance(value, float):
            log.info("%s: %-40s %.2f", args.stage, name, value)
    directory.mkdir(parents=True, exist_ok=True)
    if any(samples.values()) or asked.pictures == directory:
        asked.pictures.mkdir(exist_ok=True)
        write_json(asked.pictures / "samples.json", samples)
    differs = {"differs": asked.differs} if asked.differs else {}
    write_json(asked.path, {"step": step, **asked.marks, **differs, **metrics})
    log.info("%s: wrote %s", args.stage, asked.path)


def _first_difference(asked: Asked) -> str:
    """The first difference from the stage's own evaluation, and how many more there are, for a log line."""
    key, (own, here) = next(iter(asked.differs.items()))
    more = f" and {len(asked.differs) - 1} more" if len(asked.differs) > 1 else ""
    return f"{key}={here} instead of {own}{more}"


def _weights(directory: Path, stage: Stage, given: Path | None) -> tuple[int | None, Path]:
    """(the step, or None where it is not known, the weights to evaluate): those that were given, else the finished
    stage's, else the newest complete checkpoint's. ValueError where there are none."""
    if given is not None:
        return None, given
    if (finished := directory / WEIGHTS).is_file():
        return stage.steps, finished
    if (newest := newest_weights(directory / "checkpoints")) is not None:
        log.info("the stage is not finished; evaluating its checkpoint of step %d", newest[0])
        return newest
    raise ValueError(f"{directory} has neither weights nor a complete checkpoint; train the stage, or give --weights")


def _trained_with(directory: Path, args: argparse.Namespace) -> tuple[str, list[str]]:
    """The recipe's name and settings: as given, else as pretrain.train noted them in recipe.json. ValueError where
    recipe.json notes none, and where it names a recipe file: whoever evaluates somebody else's directory would execute
    their code."""
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
    return name, settings


if __name__ == "__main__":
    sys.exit(main())
