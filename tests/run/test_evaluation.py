"""Which evaluation is the stage's own; any other one has a file of its own and never takes its place."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.config import Recipe, Stage
from pretrain.data.sources import ImageShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.files import write_json
from pretrain.recipes import tiny
from pretrain.run.directory import note_recipe
from pretrain.run.evaluation import Asked, asked_evaluation, evals_hash
from tests.run.test_identity import RECIPE, VISION
from tests.toys import numbered_samples, numbered_source, write_source


def with_evals(*evaluations: MaskedAccuracy, **changes) -> tuple[Recipe, Stage]:
    stage = replace(VISION, evals=evaluations, visual_tokenizer=None, **changes)
    return replace(RECIPE, stages={"vision": stage}), stage


@pytest.fixture
def run(tmp_path):
    """A function: (evals, changes of the stage, arguments) -> which evaluation that is; the data are in tmp_path."""
    numbered_source(tmp_path / "a")
    numbered_source(tmp_path / "b")
    directory = tmp_path / "vision"
    plain = with_evals(MaskedAccuracy({"images": ImageShards(f"{tmp_path}/a")}))
    note_recipe(directory, plain[0], {}, {})

    def asked(data: str = "a", weights: str = "w" * 16, given: bool = False, name: str = "", **changes) -> Asked:
        samples = changes.pop("samples", 512)
        evaluation = MaskedAccuracy({"images": ImageShards(f"{tmp_path}/{data}")}, samples=samples)
        recipe, stage = with_evals(evaluation, **changes)
        return asked_evaluation(directory, "vision", (recipe, stage), plain[0], weights=weights, given=given, name=name)

    return asked


def made(asked: Asked) -> Path:
    write_json(asked.path, {"step": 3, **asked.marks, "differs": asked.differs, "masked/image/accuracy": 1.0})
    return asked.path


def test_the_stages_own_evaluation_is_eval_json_whatever_its_weights(run, tmp_path):
    own = run()
    assert own.path == tmp_path / "vision" / "eval.json" and own.pictures == tmp_path / "vision" and not own.made
    made(own)
    assert run().made and run(steps=9, drop_path=0.0).made, "what only training depends on"
    newer = run(weights="x" * 16)
    assert newer.path == own.path and not newer.made, "a newer checkpoint's numbers take the place"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"samples": 8}, "evals.0.samples"),
        ({"data": "b"}, "evals.0.mix.images.shards"),
        ({"transform": replace(VISION.transform, evaluation="squash")}, "transform.evaluation"),
        ({"objectives": (replace(VISION.objectives[0], image_ratio=0.9),)}, "objectives.0.image_ratio"),
    ],
)
def test_another_evaluation_never_takes_its_place(run, changes, key):
    own, other = run(), run(**changes)
    before = made(own).read_text()
    assert list(other.differs) == [key]
    assert other.path != own.path and other.path.name.startswith("eval-") and other.pictures != own.pictures
    made(other)
    assert run(**changes).made and run().made and own.path.read_text() == before
    assert run(weights="x" * 16, **changes).path == other.path, "the same evaluation of a newer checkpoint"
    assert run(weights="x" * 16, given=True, **changes).path != other.path, "and of weights of other origin"


def test_other_data_in_the_same_place_are_another_evaluation(run, tmp_path):
    made(run())
    write_source(tmp_path / "a", [numbered_samples(shard, 5) for shard in range(3)])
    other = run()
    assert list(other.differs) == ["data"] and other.path.name != "eval.json" and not other.made


def test_an_evaluation_added_after_training_is_the_stages_own(run, tmp_path):
    path = tmp_path / "vision" / "recipe.json"
    noted = json.loads(path.read_text())
    noted["stages"]["vision"]["evals"] = []
    path.write_text(json.dumps(noted))
    assert run().path.name == "eval.json" and run(samples=8).path.name != "eval.json"


def test_a_chosen_name(run, tmp_path):
    other = run(name="coco-5k", samples=8)
    assert other.path == tmp_path / "vision" / "eval-coco-5k.json"
    made(other)
    assert run(name="coco-5k", samples=8).made and not run(name="coco-5k", samples=8, weights="x").made
    with pytest.raises(ValueError, match="is another evaluation; choose another name"):
        run(name="coco-5k", samples=9)
    for wrong in ("../eval", "a/b", ".x", "a b", "x" * 65, "\x1b"):
        with pytest.raises(ValueError, match=r"--name=.* is not usable"):
            run(name=wrong)


def test_given_weights_have_their_hash_as_the_name(run):
    assert run(given=True, weights="abcdef0123456789").path.name == "eval-abcdef01.json"


@pytest.mark.parametrize(
    ("stage", "noted"),
    [("vision", "c0c4847c8f464a72"), ("fusion", "47224017abc2ace2"), ("retrieval", "3618a05a3572ad88")],
)
def test_an_evaluation_of_an_earlier_program_is_the_same(stage, noted):
    """Of the quickstart, as 5e7bde7 (2026-11-28) noted it in eval.json. A config that has got a field since then stands
    in evaluation.LATER, with the value under which nothing is different."""
    assert evals_hash(tiny.RECIPE, tiny.RECIPE.stages[stage]) == noted


def test_a_later_field_with_another_value_is_another_evaluation():
    stage = tiny.RECIPE.stages["vision"]
    other = replace(tiny.RECIPE, model=replace(tiny.MODEL, final_norm=False))
    assert evals_hash(other, stage) != evals_hash(tiny.RECIPE, stage)
