"""Which run is the same one: under other settings, and under a program that has learnt or lost some."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import ImageShards
from pretrain.evals.masked import MaskedAccuracy
from pretrain.models.visual_tokenizer.teachers import Clip, Encoder, Pixels
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim
from pretrain.parallel.sizes import Parallel
from pretrain.rollbacks import RollbackRule
from pretrain.run.directory import finished, note_recipe, run_identity
from pretrain.run.identity import as_begun, differences, hash_of, identity_of, stage_hash
from pretrain.tasks.tokenizer import TrainTokenizer
from tests.toy_models import CODES, PAPER, VQ

COMMON: dict[str, Any] = {
    "mix": {"images": ImageShards("images")}, "batch": BatchSize(images=8), "optim": Optim(), "steps": 3,
}  # fmt: skip
MASKED = MaskedData(image_codes=CODES)
VISION = Stage(**COMMON, objectives=(MASKED,), experts=("vision",), visual_tokenizer="tokenizer", drop_path=0.2)
TOKENIZER = Stage(**COMMON, model=VQ, task=TrainTokenizer())
RECIPE = Recipe("toy", PAPER, {"vision": VISION, "tokenizer": TOKENIZER})
# What the program of before 2026-11-28 (a3aa293) noted of these two stages; its model had image_codes=12, drop_path=0.1
# and activation_checkpointing=2.
OLD = json.loads(Path(__file__).with_name("old_identities.json").read_text())


def noted(stage: Stage = VISION) -> dict[str, Any]:
    return json.loads(json.dumps(identity_of(RECIPE, stage)))


@pytest.mark.parametrize(
    ("name", "changes", "stage"),
    [
        ("vision", {}, VISION),
        ("tokenizer", {}, TOKENIZER),
        ("tokenizer", {"teacher": "clip:$DATA/clip"}, replace(TOKENIZER, task=TrainTokenizer(Clip("$DATA/clip")))),
        ("tokenizer", {"teacher": "vision"}, replace(TOKENIZER, task=TrainTokenizer(Encoder("vision")))),
    ],
)
def test_a_run_of_the_old_program_is_the_same_run(name, changes, stage):
    assert differences(OLD[name] | changes, RECIPE, stage) == {}


PIXELS, CLIP = {"class": "Pixels", "cells": 4}, {"class": "Clip", "directory": "x"}


@pytest.mark.parametrize(
    ("name", "stage", "key", "values"),
    [
        ("vision", replace(VISION, optim=Optim(lr=0.5)), "optim.lr", (1e-3, 0.5)),
        ("vision", replace(VISION, steps=4), "steps", (3, 4)),
        ("vision", replace(VISION, drop_path=0.1), "drop_path", (0.2, 0.1)),
        ("vision", replace(VISION, model=replace(PAPER, dim=64)), "model.dim", (32, 64)),
        ("vision", replace(VISION, objectives=(MaskedData(image_codes=9),)), "objectives.0.image_codes", (12, 9)),
        ("vision", replace(VISION, mix={"images": ImageShards("other")}), "mix.images.shards", ("images", "other")),
        ("tokenizer", replace(TOKENIZER, model=replace(VQ, codes=9)), "model.codes", (16, 9)),
        ("tokenizer", replace(TOKENIZER, task=TrainTokenizer(Pixels(2))), "task.teacher.cells", (4, 2)),
        ("tokenizer", replace(TOKENIZER, task=TrainTokenizer(Clip("x"))), "task.teacher", (PIXELS, CLIP)),
    ],
)
def test_a_changed_setting_is_named_with_both_values(name, stage, key, values):
    for then in (OLD[name], noted(RECIPE.stages[name])):
        assert differences(then, RECIPE, stage) == {key: values}


def test_what_changes_no_number_may_change():
    stage = replace(VISION, parallel=Parallel(tensor=2), activation_checkpointing=2, compile=True)
    stage = replace(stage, transform=replace(stage.transform, evaluation="squash"))
    evals = (MaskedAccuracy({"images": ImageShards("images")}),)
    stage = replace(stage, evals=evals, evals_every=2, best="masked/image/accuracy", patience=3)
    recipe = replace(RECIPE, log_every=3, keep=9, name="other", loading=replace(RECIPE.loading, workers=7))
    recipe = replace(recipe, keep_every=5, save_in_background=False, rollback=RollbackRule(most=3))
    assert stage_hash(recipe, stage) == stage_hash(replace(RECIPE, copy_every=2), VISION) == stage_hash(RECIPE, VISION)
    assert differences(noted(), recipe, stage) == {} == differences(OLD["vision"], recipe, stage)
    assert differences(noted(), replace(recipe, seed=3), stage) == {"seed": (0, 3)}


def test_an_old_run_goes_on_with_the_pixels_it_began_with():
    then = noted()
    assert as_begun(VISION, then) is VISION
    del then["transform"]["antialias"]
    old = as_begun(VISION, then)
    assert not old.transform.antialias and differences(then, RECIPE, VISION) == {} == differences(then, RECIPE, old)
    assert differences(noted(), RECIPE, old) == {"transform.antialias": (True, False)}


def test_a_run_of_before_cover_is_the_same_until_it_is_set():
    then, less = noted(), replace(VISION, transform=replace(VISION.transform, cover=0.75))
    assert then["transform"].pop("cover") == 1.0
    assert differences(then, RECIPE, VISION) == {}
    assert differences(then, RECIPE, less) == differences(noted(), RECIPE, less) == {"transform.cover": (1.0, 0.75)}


def test_a_field_that_the_old_program_did_not_know_had_its_default():
    then = noted()
    del (
        then["drop_path"],
        then["trainable"],
        then["task"],
        then["model"]["key_bias"],
        then["objectives"][0]["text_ratio"],
    )
    plain = replace(VISION, drop_path=0.0)
    assert differences(then, RECIPE, plain) == {}
    now = replace(plain, model=replace(PAPER, key_bias=False), objectives=(replace(MASKED, text_ratio=0.3),))
    assert differences(then, RECIPE, now) == {"model.key_bias": (True, False), "objectives.0.text_ratio": (0.15, 0.3)}
    assert differences(then, RECIPE, VISION) == {"drop_path": (0.0, 0.2)}


def test_a_field_that_is_not_known_any_more_is_named():
    then = noted()
    then["model"]["rotary"] = True
    assert differences(then | {"queue": 5}, RECIPE, VISION) == {"model.rotary": (True, None), "queue": (5, None)}


def test_an_old_run_goes_on_under_its_own_identity(tmp_path):
    """Its checkpoints and weights carry the hash of what was noted."""
    note_recipe(tmp_path, RECIPE, OLD["vision"], {})
    assert run_identity(tmp_path, RECIPE, VISION) == identity_of(RECIPE, VISION), "nothing has been saved yet"
    (tmp_path / "checkpoints" / "step_00000002").mkdir(parents=True)
    assert run_identity(tmp_path, RECIPE, VISION) == OLD["vision"] and not finished(tmp_path, OLD["vision"])
    assert hash_of(OLD["vision"]) != hash_of(identity_of(RECIPE, VISION))
    changed = replace(VISION, steps=4, optim=Optim(lr=0.5, clip=1.0), batch=BatchSize(images=4), drop_path=0.0)
    with pytest.raises(ValueError, match=r"batch\.images=8 \(now 4\), drop_path=0\.2 \(now 0\.0\).* and 1 more"):
        run_identity(tmp_path, RECIPE, changed)
