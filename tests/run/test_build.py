"""The stages of every recipe at a toy size: each is built, and fills itself from the one before."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pretrain.checkpoint.weights import carry_over, read_weights, write_weights
from pretrain.config import Recipe
from pretrain.parallel.mesh import create_mesh
from pretrain.parallel.sizes import Parallel
from pretrain.recipes import find_recipe
from pretrain.run.build import build_task, load_start, weights_config

SIZE = {"dim": 16, "depth": 4, "heads": 2, "ffn_dim": 32, "image_size": 32, "patch_size": 16, "vocab_size": 64}


def small(name: str) -> Recipe:
    recipe = find_recipe(name)
    stages = {key: replace(s, transform=replace(s.transform, size=32)) for key, s in recipe.stages.items()}
    return replace(recipe, model=replace(recipe.model, **SIZE, image_codes=16), stages=stages)


@pytest.mark.parametrize("name", ["tiny", "beit3_base", "beit3_base_released", "vlmo_base"])
def test_each_stage_starts_from_the_one_before(tmp_path, name):
    recipe = small(name)
    for key in ("vision", "language", "fusion", "retrieval"):
        stage = recipe.stages[key]
        task = build_task(recipe, stage, tmp_path)
        before = load_start(task, stage, tmp_path, None, create_mesh(Parallel())).init
        state = carry_over(task.state_dict(), before)
        write_weights(state, tmp_path / key / "weights.safetensors", weights_config(recipe, stage, key))
        if before is not None:  # nothing of the stages before is lost on the way
            assert read_weights(before)[0].keys() <= state.keys()
    wanted = {n for n in task.state_dict() if n.startswith("encoder.")}
    assert wanted <= read_weights(tmp_path / "fusion")[0].keys()


@pytest.mark.parametrize(
    ("stage", "knob"), [("vision", "model.image_size=32"), ("tokenizer", "tokenizer.image_size=224")]
)
def test_pictures_of_another_size_are_refused_before_anything_starts(tmp_path, stage, knob):
    recipe = small("beit3_base")
    changed = replace(recipe.stages[stage], transform=replace(recipe.stages[stage].transform, size=48))
    with pytest.raises(ValueError, match=rf"transform\.size=48 but {knob}"):
        build_task(recipe, changed, tmp_path)
