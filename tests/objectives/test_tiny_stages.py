"""VLMo's third stage, and ALBEF's and BLIP's only one, on toy data: contrast, matching and words (masked, or written)
train together on two ranks, resume to the bit, the latter two with teacher and queue, and are evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.weights import weights_digest
from tests.small_run import Ranks, command, evaluate
from tests.toys import pair_sample, write_source, write_text_model

SHORT = ("init_from=None", "steps=4", "optim.warmup_steps=1", "batch.dual=8")


def run(data: Path, directory: Path, *more: str) -> None:
    directory.mkdir(exist_ok=True)
    line = command(data, directory, "fusion", *SHORT, *more, ds="zero2.json")
    line[line.index("--recipe") + 1] = str(data / "recipe.py")
    log = directory / "log"
    assert Ranks(line, data, 2, log).wait(150) == [0, 0], log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("recipe", ["tiny_vlmo", "tiny_albef", "tiny_blip"])
def test_the_stage_trains_resumes_and_retrieves(recipe, tmp_path):
    captions = [f"a {size} {colour} {shape}" for size in ("big", "small") for colour in ("red", "green", "blue")
                for shape in ("dog", "cat")]  # fmt: skip
    shards = [[pair_sample(f"{s}{i}", 6 * s + i, captions[6 * s + i]) for i in range(6)] for s in range(2)]
    for part in ("train", "heldout"):
        write_source(tmp_path / "pairs" / part, shards)
    write_text_model(tmp_path / "text.model", captions, 60)
    (tmp_path / "recipe.py").write_text(
        f"from dataclasses import replace\nfrom pretrain.recipes.{recipe} import RECIPE\n"
        "RECIPE = replace(RECIPE, log_every=1, save_every=2, loading=replace(RECIPE.loading, workers=0))\n"
    )
    stage, more = tmp_path / "run/fusion", () if recipe == "tiny_blip" else ("batch.pairs=4",)
    run(tmp_path, stage.parent, *more)
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    words = {"loss/captioning", "accuracy/caption"} if recipe == "tiny_blip" else {"loss/masked", "accuracy/pair_text"}
    names = {"loss/contrastive", "loss/matching", "accuracy/matching"} | words
    names |= {"alpha"} if recipe != "tiny_vlmo" else set()
    assert names <= set(lines[0])
    assert lines[-1]["loss"] < lines[0]["loss"]
    first = weights_digest(stage)
    (stage / "weights.safetensors").unlink()
    shutil.rmtree(stage / "checkpoints/step_00000004")
    run(tmp_path, stage.parent, *more)
    assert "resumed from" in (stage.parent / "log").read_text()
    assert weights_digest(stage) == first, "as if it had not been killed after step 2"
    done = evaluate(tmp_path, stage.parent, "fusion")
    assert done.returncode == 0, done.stderr
    scores = json.loads((stage / "eval.json").read_text())
    assert scores["retrieval/candidates"] == 12 and 0 <= scores["retrieval/image_to_text/R@1"] <= 100
