"""Options of any stage as a user runs them: killed and started again, handed over, evaluated, refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain import export
from pretrain.checkpoint.weights import ADAPTERS, LAST, read_apart, read_weights, with_adapters
from pretrain.data.text_tokenizer import TOKENIZER
from pretrain.data.transforms import ImageTransform
from pretrain.models.lora import is_adapter
from pretrain.optim import Optim
from pretrain.parallel.sizes import Parallel
from pretrain.run.build import check_model
from tests.run import test_identity as identity
from tests.run.test_identity import VISION
from tests.small_run import Ranks, check_weights, command, evaluate, tokenizer_of

RECIPE = """
import os
from dataclasses import replace
from pretrain.models.lora import Lora
from pretrain.parallel.average import Ema
from pretrain.recipes import find_recipe

SMALL = find_recipe(os.path.join(os.environ["DATA"], "recipe.py"))
VISION = replace(SMALL.stages["vision"], steps=4)
LORA = replace(VISION, init_from="vision", lora=Lora(rank=2, targets=("*.attention.*",)))
LATER = replace(VISION, steps=6, unfreeze={"encoder.*": 4}, ema=Ema(0.7), evals_every=3,
                optim=replace(VISION.optim, factors={"encoder.vision*": 0.5}))
RECIPE = replace(SMALL, stages=SMALL.stages | {"vision": VISION, "adapted": LORA, "later": LATER})
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
    assert {name.rpartition(".")[0] + ".weight" for name in alone if is_adapter(name)} == changed
    sent = Path(shutil.copytree(stage, tmp_path / "sent", ignore=shutil.ignore_patterns("checkpoints")))
    (sent / TOKENIZER).write_bytes(b"of a stage that reads texts")
    assert export.main(["merge", *map(str, (start / "vision", sent / ADAPTERS, tmp_path / "merged"))]) == 0
    check_weights(tmp_path / "merged", stage)
    assert (tmp_path / "merged" / TOKENIZER).read_bytes() == (sent / TOKENIZER).read_bytes()
    with pytest.raises(ValueError, match="was trained beside other weights than"):
        with_adapters(stage, stage / ADAPTERS)
    with pytest.raises(ValueError, match="holds no adapters; give the"):
        with_adapters(stage, stage / "weights.safetensors")
    figures = []
    for weights in (stage / "weights.safetensors", max(stage.glob("checkpoints/step_*")) / "weights.safetensors"):
        done = evaluate(data, tmp_path / "killed", "adapted", start / "recipe.py", "--weights", str(weights),
                        "--set", tokenizer_of(data))  # fmt: skip
        assert done.returncode == 0, done.stderr
        figures.append(read_json(max(stage.glob("eval-*.json"), key=lambda path: path.stat().st_mtime_ns)))
    assert figures[0]["weights"] != figures[1]["weights"]
    assert figures[0]["masked/image/accuracy"] == pytest.approx(figures[1]["masked/image/accuracy"], abs=1.0)


@pytest.mark.slow
def test_a_part_waits_for_its_step_and_the_average_is_handed_over(data, start, tmp_path):
    said = [go(data, start, tmp_path / name, "later", ds="zero1.json") for name in ("alone", "killed")]
    assert "M at 0.5 x lr, decay 0.05, from step 4 on" in said[0]
    stage, alone = tmp_path / "killed" / "later", tmp_path / "alone" / "later"
    lose_the_end(stage)
    assert "resumed from" in go(data, start, tmp_path / "killed", "later", ds="zero1.json")
    check_weights(stage, alone)
    average, last = read_weights(stage)[0], read_weights(stage / LAST)[0]
    same = {name for name in average if torch.equal(average[name], last[name])}
    assert set(average) == set(last) and not any(name.endswith("weight") for name in same)
    assert all(torch.equal(value, last[name]) for name, value in read_weights(alone / LAST)[0].items())
    # What is seen in training is what is handed over, and what a checkpoint stands for.
    during = [json.loads(line) for line in (alone / "evals.jsonl").read_text().splitlines()]
    assert [line["step"] for line in during] == [3, 6]
    (alone / "weights.safetensors").rename(alone / "away")
    for place in ("checkpoint", "weights"):
        done = evaluate(data, alone.parent, "later", start / "recipe.py", "--set", tokenizer_of(data))
        assert done.returncode == 0, done.stderr
        figure = read_json(alone / "eval.json")["masked/image/accuracy"]
        assert figure == during[-1]["masked/image/accuracy"], place
        (alone / "eval.json").unlink()
        if place == "checkpoint":
            (alone / "away").rename(alone / "weights.safetensors")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"unfreeze": {"encoder.*": 1}}, r"unfreeze\.encoder\.\*=1 is no later step of 3; use 2 to 3"),
        ({"unfreeze": {"encoder.*": 2}, "parallel": Parallel(pipe=2)}, "pipe=2 does not go with unfreeze"),
        ({"unfreeze": {"encoder.*": 2}, "optim": Optim(eps=0)}, r"optim\.eps=0 does not go with unfreeze"),
        ({"unfreeze": {"*": 2}}, "leaves nothing to train in step 1"),
        ({"unfreeze": {"encoder.vision*": 2}, "trainable": ("objectives.*",)}, "matches no trainable parameter"),
        ({"optim": Optim(factors={"encoder.text*": 2.0})}, r"optim\.factors='encoder\.text\*' matches no trainable"),
    ],
)
def test_what_does_not_go_together_is_said(changes, says):
    def checked() -> None:
        check_model(identity.RECIPE, replace(VISION, transform=ImageTransform(size=32), **changes))

    with pytest.raises(ValueError, match=says):
        checked()


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())
