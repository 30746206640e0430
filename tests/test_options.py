"""Options of any stage as a user runs them: killed and started again, handed over, evaluated, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.weights import ADAPTERS, read_apart, read_weights
from tests.small_run import Ranks, check_weights, command, evaluate, tokenizer_of

RECIPE = """
import os
from dataclasses import replace
from pretrain.models.lora import Lora
from pretrain.recipes import find_recipe

SMALL = find_recipe(os.path.join(os.environ["DATA"], "recipe.py"))
VISION = replace(SMALL.stages["vision"], steps=4)
LORA = replace(VISION, init_from="vision", lora=Lora(rank=2, targets=("*.attention.*",)))
RECIPE = replace(SMALL, stages=SMALL.stages | {"vision": VISION, "adapted": LORA})
"""


@pytest.fixture(scope="module")
def start(data, tmp_path_factory) -> Path:
    """A run directory with a finished `vision`, and recipe.py."""
    place = tmp_path_factory.mktemp("options")
    (place / "recipe.py").write_text(RECIPE)
    go(data, place, place, "vision", ranks=1, ds="zero0.json")
    return place


def go(data: Path, start: Path, run: Path, stage: str, *, ranks: int = 2, ds: str = "zero1.json") -> str:
    """What the run said."""
    line, log = command(data, run, stage, tokenizer_of(data), ds=ds), run / "log"
    line[line.index("--recipe") + 1] = str(start / "recipe.py")
    if run != start and not (run / "vision").exists():
        shutil.copytree(start / "vision", run / "vision")
    assert Ranks(line, data, ranks, log).wait(120) == [0] * ranks, log.read_text()
    return log.read_text()


def lose_the_end(run: Path) -> None:
    """As if the run had been killed in its last step."""
    for path in run.glob("*.safetensors"):
        path.unlink()
    shutil.rmtree(max(run.glob("checkpoints/step_*")))


@pytest.mark.slow
def test_adapters_are_trained_resumed_merged_and_evaluated(data, start, tmp_path):
    for name, ds in (("alone", "zero3.json"), ("killed", "zero3.json")):
        go(data, start, tmp_path / name, "adapted", ds=ds)
    stage = tmp_path / "killed" / "adapted"
    lose_the_end(stage)
    assert "resumed from" in go(data, start, tmp_path / "killed", "adapted", ds="zero3.json")
    check_weights(stage, tmp_path / "alone" / "adapted")
    base, whole = read_weights(start / "vision")[0], read_weights(stage)[0]
    changed = {name for name in base if name.startswith("encoder.") and not torch.equal(base[name], whole[name])}
    assert set(base) == set(whole) and changed and all(".attention." in name for name in changed)
    alone, about = read_apart(stage / ADAPTERS)
    assert (
        about["lora"]["rank"] == 2 and about["base_sha256"] == read_json(start / "vision/config.json")["weights_sha256"]
    )
    assert {name.rpartition(".")[0] + ".weight" for name in alone} == changed
    figures = []
    for weights in (stage / "weights.safetensors", max(stage.glob("checkpoints/step_*")) / "weights.safetensors"):
        done = evaluate(data, tmp_path / "killed", "adapted", start / "recipe.py", "--weights", str(weights),
                        "--set", tokenizer_of(data))  # fmt: skip
        assert done.returncode == 0, done.stderr
        figures.append(read_json(max(stage.glob("eval-*.json"), key=lambda path: path.stat().st_mtime_ns)))
    assert figures[0]["weights"] != figures[1]["weights"]
    assert figures[0]["masked/image/accuracy"] == pytest.approx(figures[1]["masked/image/accuracy"], abs=1.0)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
