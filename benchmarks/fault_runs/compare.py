"""Compares what a run of many lives ended with to what a run that was left alone did."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pretrain.checkpoint.directory import MANIFEST
from pretrain.checkpoint.weights import WEIGHTS, read_weights
from pretrain.metrics import MEASURED, read_metrics

# Of losses and weights where the layout changed on the way: other sums in another order.
ROUNDING = 1e-5


class Ending(NamedTuple):
    """`unequal` names what is not the same to the bit: the weights, the optimizer's and the generators' state in the
    last checkpoint, the lines of metrics.jsonl (without what a clock measured), the trace of each rank. The samples
    are counted step by step, and `apart` is the largest difference of a loss or a weight."""

    unequal: list[str]
    lost: int
    repeated: int
    apart: float


def compare(stage: Path, alone: Path) -> Ending:
    """Two directories of a finished stage. Raises ValueError where one of them holds no finished stage."""
    got, want = read_weights(stage / WEIGHTS)[0], read_weights(alone / WEIGHTS)[0]
    same = {
        "weights": got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want),
        "state": _last_state(stage) == _last_state(alone),
        "metrics": _numbers(stage) == _numbers(alone),
        "samples": _traces(stage) == _traces(alone),
    }
    lost, repeated = count_samples(_by_step(stage), _by_step(alone))
    distances = [float((got[name].double() - value.double()).abs().max()) for name, value in want.items()]
    return Ending(
        [name for name, equal in same.items() if not equal],
        lost,
        repeated,
        max([*distances, _losses_apart(_numbers(stage), _numbers(alone))]),
    )


def count_samples(got: dict[int, Counter[str]], want: dict[int, Counter[str]]) -> tuple[int, int]:
    """How many samples were lost, and how many came too often, over the steps {step: how often each key came}."""
    steps = got.keys() | want.keys()
    lost = sum((want.get(step, Counter()) - got.get(step, Counter())).total() for step in steps)
    repeated = sum((got.get(step, Counter()) - want.get(step, Counter())).total() for step in steps)
    return lost, repeated


def check_epochs(alone: Path) -> None:
    """Checks the run that the others are compared with: it must have taken every sample equally often, give or take one
    epoch. Raises ValueError where it has not."""
    keys = sum(_by_step(alone).values(), Counter())
    for kind in {key[0] for key in keys}:
        times = {count for key, count in keys.items() if key[0] == kind}
        if max(times) - min(times) > 1:
            raise ValueError(
                f"{alone}: samples of kind {kind!r} came {min(times)} to {max(times)} times, not in epochs"
            )


def _last_state(stage: Path) -> dict[str, Any]:
    """Of the newest checkpoint: its files, and of each rank's generators torch's, from which a run draws. (Python's is
    saved too, but begins elsewhere in each process, and nothing draws from it.)"""
    newest = max((stage / "checkpoints").glob("step_*"))
    files = json.loads((newest / MANIFEST).read_text())["files"]
    generators = {name for name in files if name.startswith("random_rank")}
    drawn = {name: torch.load(newest / name, weights_only=True)["torch"].tolist() for name in generators}
    return {"step": newest.name, **{name: entry for name, entry in files.items() if name not in generators}, **drawn}


def _numbers(stage: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in read_metrics(stage / "metrics.jsonl")
    ]


def _traces(stage: Path) -> dict[str, list[str]]:
    return {path.name: path.read_text().splitlines() for path in stage.glob("samples.rank*.jsonl")}


def _by_step(stage: Path) -> dict[int, Counter[str]]:
    """{step: how often each key came}, over all ranks."""
    steps: dict[int, Counter[str]] = {}
    for lines in _traces(stage).values():
        for line in map(json.loads, lines):
            steps.setdefault(line["step"], Counter()).update(line["keys"])
    return steps


def _losses_apart(got: list[dict[str, Any]], want: list[dict[str, Any]]) -> float:
    """The largest difference of a loss; inf where the lines are not of the same steps."""
    if [line["step"] for line in got] != [line["step"] for line in want]:
        return float("inf")
    names = [name for name in want[0] if name == "loss" or name.startswith("loss/")]
    return max(abs(a[name] - b[name]) for a, b in zip(got, want, strict=True) for name in names)
