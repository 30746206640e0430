"""Shows what weights files and checkpoints hold and how two differ, and averages several (a model soup).

    python -m pretrain.checkpoints inspect runs/base/vision runs/base/vision/checkpoints/step_00001000
    python -m pretrain.checkpoints diff runs/base/fusion runs/base/retrieval
    python -m pretrain.checkpoints average runs/base/retrieval/checkpoints/step_* --out runs/soup/retrieval

Each PLACE is a weights.safetensors, or a directory that has one: a stage's, or a checkpoint's. `average` writes a
directory that pretrain.load and init_from read, with the text tokenizer of the others. `diff` exits with 0 if all
tensors are the same, and with 1 if not. Files are read tensor by tensor, so that memory holds one tensor of each.
Of a checkpoint of a stage with ema these are the weights themselves, not their running average.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.averaging import average, differences, kinds
from pretrain.checkpoint.directory import MANIFEST
from pretrain.checkpoint.weights import WEIGHTS, check_weights, open_weights, weights_header
from pretrain.command import make_parser, run
from pretrain.data.text_tokenizer import BESIDE_WEIGHTS
from pretrain.json_files import read_object
from pretrain.visible import say


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("pretrain.checkpoints", __doc__, "inspect runs/quickstart/retrieval")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("inspect", help="what is in files: whose recipe, which step, what was evaluated")
    one.add_argument("places", nargs="+", type=Path, metavar="PLACE")
    two = commands.add_parser("diff", help="what differs between two")
    two.add_argument("places", nargs=2, type=Path, metavar="PLACE")
    two.add_argument("--most", type=int, default=20, help="tensors to list (%(default)s)")
    several = commands.add_parser("average", help="the mean of several")
    several.add_argument("places", nargs="+", type=Path, metavar="PLACE")
    several.add_argument("--out", type=Path, required=True, help="a new directory")
    args = parser.parse_args(arguments)
    actions = {"inspect": _inspect, "diff": _diff, "average": _average}
    return run(lambda: actions[args.command](args), state="nothing was written")


def _inspect(args: argparse.Namespace) -> None:
    for place in args.places:
        for name, value in facts(place).items():
            say(f"{name:>12}  {value}")
        print()


def facts(place: Path) -> dict[str, Any]:
    """What a weights file holds, and what the files beside it say about it, by name. ValueError if it is damaged."""
    path = place / WEIGHTS if place.is_dir() else place
    check_weights(path)
    with open_weights(path) as (file, header):
        tensors = kinds(file)
    config, digest = header.get("config", {}), str(header.get("sha256", "none: a file of other origin"))
    sizes = {name: torch.Size(kind.shape).numel() for name, kind in tensors.items()}
    parts: Counter[str] = Counter()
    for name, size in sizes.items():
        parts[".".join(name.split(".")[:2])] += size
    about: dict[str, Any] = {"file": path, "bytes": f"{path.stat().st_size:,}", "sha256": digest}
    about |= {name: config[name] for name in ("recipe", "stage", "average_of", "recipe_hash") if name in config}
    types = _counted(Counter(kind.type for kind in tensors.values()))
    about["numbers"] = f"{sum(sizes.values()):,} in {len(sizes)} tensors, {types}"
    about["parts"] = ", ".join(f"{name} {size:,}" for name, size in sorted(parts.items()))
    if isinstance(model := config.get("model"), dict):
        about["model"] = ", ".join(f"{name}={value}" for name, value in model.items())
    return about | _around(path, digest)


def _around(path: Path, digest: str) -> dict[str, Any]:
    """The step of a checkpoint, and the evaluations of the weights with this digest."""
    about: dict[str, Any] = {}
    if (path.parent / MANIFEST).is_file():
        about["step"] = read_object(path.parent / MANIFEST).get("step")
    for evaluation in sorted(path.parent.glob("eval*.json")):
        scores = read_object(evaluation)
        if scores.get("weights") != digest:
            about[evaluation.name] = "of other weights"
            continue
        about.setdefault("step", scores.get("step"))
        numbers = {k: v for k, v in scores.items() if type(v) in (int, float) and k != "step"}
        about[evaluation.name] = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
    return about


def _counted(types: Counter[str]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in sorted(types.items()))


def _diff(args: argparse.Namespace) -> int:
    if args.most < 0:
        raise ValueError(f"--most {args.most} is below 0; use 20")
    a, b = args.places
    same, others = differences(a, b)
    for each in others[: args.most]:
        moved = f"at most {each.largest:.3g}, {100 * each.relative:.3g} % of its norm"
        say(f"{each.name}: {each.what or moved}")
    if len(others) > args.most:
        print(f"... and {len(others) - args.most} more")
    configs = [weights_header(place).get("config", {}) for place in args.places]
    for name, ours, theirs in _settings(*configs):
        say(f"config: {name} is {ours} and {theirs}")
    print(f"{same} tensors are the same, {len(others)} are not")
    return 1 if others else 0


def _settings(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, ours, theirs) of each setting that differs between two configs."""
    changes: list[tuple[str, Any, Any]] = []
    for name in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            changes += _settings(a, b, f"{prefix}{name}.")
        elif a != b:
            changes.append((prefix + name, a, b))
    return changes


def _average(args: argparse.Namespace) -> None:
    digest = average(args.places, args.out)
    places = [place if place.is_dir() else place.parent for place in args.places]
    for name in BESIDE_WEIGHTS:
        texts = {(place / name).read_bytes() for place in places if (place / name).is_file()}
        if len(texts) == 1:
            shutil.copyfile(next(p / name for p in places if (p / name).is_file()), args.out / name)
    say(f"{args.out / WEIGHTS}: the mean of {len(args.places)}, sha256 {digest}")


if __name__ == "__main__":
    sys.exit(main())
