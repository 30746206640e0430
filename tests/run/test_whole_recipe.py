"""A mistake in a later stage is found when the first one starts."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from pretrain import train
from pretrain.checkpoint.weights import write_weights
from pretrain.config import Recipe
from pretrain.recipes import find_recipe
from pretrain.run.whole_recipe import check_other_stages
from tests.toys import write_text_model

LINES = ["a red square left of a blue circle", "the green star is above the small box"] * 20


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """tiny, with its text tokenizer and without any data."""
    monkeypatch.setenv("DATA", str(tmp_path))
    write_text_model(tmp_path / "text.model", LINES, 60)
    return find_recipe("tiny")


def change(recipe: Recipe, name: str, **fields) -> Recipe:
    return replace(recipe, stages=recipe.stages | {name: replace(recipe.stages[name], **fields)})


def codes(recipe: Recipe, name: str, number: int) -> Recipe:
    (masked,) = recipe.stages[name].objectives
    return change(recipe, name, objectives=(replace(masked, image_codes=number),))


CASES = [
    (
        lambda r: change(r, "language", init_from="visoin"),
        "language",
        "init_from=visoin is no stage of the recipe.*vision",
    ),
    (lambda r: change(r, "retrieval", init_from="/no/where"), "retrieval", "init_from=/no/where is no stage"),
    (lambda r: change(r, "fusion", init_from="fusion"), "fusion", "init_from=fusion is the stage itself"),
    (
        lambda r: change(r, "fusion", visual_tokenizer="tokeniser"),
        "fusion",
        "visual_tokenizer=tokeniser is no .*tokenizer",
    ),
    (lambda r: change(r, "fusion", visual_tokenizer=None), "fusion", "visual_tokenizer is not set"),
    (lambda r: change(r, "vision", visual_tokenizer="language"), "vision", "holds no visual tokenizer"),
    (lambda r: codes(r, "fusion", 100), "fusion", "has 512 codes .* image_codes=100"),
    (lambda r: replace(r, text_tokenizer=None), "language", "text_tokenizer is not set"),
    (lambda r: replace(r, text_tokenizer="$DATA/none.model"), "language", "none.model does not exist"),
    (lambda r: change(r, "language", trainable=("nothing.*",)), "language", "matches no parameter"),
    (lambda r: change(r, "retrieval", experts=("vision", "langauge")), "retrieval", "langauge"),
]


@pytest.mark.parametrize(("mistake", "stage", "says"), CASES)
def test_a_mistake_in_a_later_stage_is_found_at_once(recipe, tmp_path, mistake, stage, says):
    with pytest.raises(ValueError, match=f"stage {stage}, which comes later: .*{says}") as refused:
        check_other_stages(mistake(recipe), "tokenizer", tmp_path / "run", changed=False)
    assert "\n" not in str(refused.value)


def test_neither_data_nor_the_weights_of_stages_before_need_be_there(recipe, tmp_path):
    for name in recipe.stages:
        check_other_stages(recipe, name, tmp_path / "run", changed=False)
    later = change(recipe, "retrieval", init_from=str(tmp_path / "run" / "fusion" / "weights.safetensors"))
    check_other_stages(later, "tokenizer", tmp_path / "run", changed=False)


def test_a_finished_stage_and_numbers_that_fit_changed_settings_are_no_mistake(recipe, tmp_path):
    wrong = change(recipe, "language", init_from="visoin")
    write_weights({}, tmp_path / "run" / "language" / "weights.safetensors", {})
    check_other_stages(wrong, "fusion", tmp_path / "run", changed=False)
    more = change(recipe, "tokenizer", model=replace(recipe.stages["tokenizer"].model, codes=1024))
    check_other_stages(more, "tokenizer", tmp_path / "run", changed=True)


def test_the_giants_stages_are_checked_in_seconds(recipe, tmp_path):
    giant = replace(find_recipe("beit3_giant"), text_tokenizer=recipe.text_tokenizer)
    begin = time.process_time()
    check_other_stages(giant, "tokenizer", tmp_path / "run", changed=False)
    assert time.process_time() - begin < 20


def test_training_says_so_before_it_needs_its_own_data(recipe, tmp_path, capsys):
    line = [
        "--recipe",
        "tiny",
        "--stage",
        "tokenizer",
        "--ds",
        "ds_configs/zero0.json",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert train.main([*line, "--set", "text_tokenizer=/none.model"]) == 2
    assert "stage language, which comes later: text_tokenizer=/none.model does not exist" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
