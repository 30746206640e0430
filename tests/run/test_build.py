"""The stages of every recipe at a toy size: each is built, and fills itself from the one before."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.save import Checkpoint
from pretrain.checkpoint.weights import read_weights, write_weights
from pretrain.config import Recipe, Stage, to_json
from pretrain.layers import PLAIN
from pretrain.models.multiway.resize import resize_relative_positions
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.parallel.mesh import create_mesh
from pretrain.parallel.sizes import Parallel
from pretrain.recipes import find_recipe
from pretrain.released_weights import resize_positions
from pretrain.run.build import build_task, compiles
from pretrain.run.hand_over import carry_over
from pretrain.run.start_weights import load_start
from pretrain.run.stored_weights import read_model

SIZE = {"dim": 16, "depth": 4, "heads": 2, "ffn_dim": 32, "patch_size": 16, "vocab_size": 64}


def small(name: str, pixels: int = 32) -> Recipe:
    recipe = find_recipe(name)
    stages = {key: replace(s, transform=replace(s.transform, size=pixels)) for key, s in recipe.stages.items()}
    return replace(recipe, model=replace(recipe.model, **SIZE, image_size=pixels), stages=stages)


def start(recipe: Recipe, stage: Stage, run_dir: Path) -> tuple[torch.nn.Module, Path | None]:
    """The task as a run begins with it, and the file that it began from."""
    task = build_task(recipe, stage, run_dir)
    return task, load_start(task, recipe, stage, run_dir, None, create_mesh(Parallel()))


@pytest.mark.parametrize("name", ["tiny", "beit3_base", "beit3_base_released", "vlmo_base"])
def test_each_stage_starts_from_the_one_before(tmp_path, name):
    recipe = small(name)
    for key in ("vision", "language", "fusion", "retrieval"):
        task, before = start(recipe, recipe.stages[key], tmp_path)
        state = carry_over(task.state_dict(), before)
        write_weights(state, tmp_path / key / "weights.safetensors", {"model": to_json(recipe.model)})
        if before is not None:  # nothing of the stages before is lost on the way
            assert read_weights(before)[0].keys() <= state.keys()
    wanted = {n for n in task.state_dict() if n.startswith("encoder.")}
    assert wanted <= read_weights(tmp_path / "fusion")[0].keys()


def test_a_checkpoint_with_an_average_starts_another_stage_by_it(tmp_path, monkeypatch):
    """As if its stage had ended there; tensors that the new stage does not build are passed on so too."""
    recipe = small("tiny")
    vision = start(recipe, recipe.stages["vision"], tmp_path)[0].state_dict()
    raw = {name: torch.randn_like(value) for name, value in vision.items()}
    step = tmp_path / "step"
    write_weights(raw, step / "weights.safetensors", {"model": to_json(recipe.model)})
    (step / "moments_rank00000.safetensors").touch()
    average = {name: value + 1 for name, value in raw.items()}
    monkeypatch.setattr("pretrain.checkpoint.save.read_average", lambda files, shapes: dict(average) if files else {})
    stage = replace(recipe.stages["language"], init_from=str(step))
    task, init = start(recipe, stage, tmp_path)
    both = raw.keys() & task.state_dict().keys()
    assert both and all(task.state_dict()[name].equal(average[name]) for name in both)
    whole = carry_over(task.state_dict(), init)
    assert raw.keys() <= whole.keys() and all(whole[name].equal(average[name]) for name in raw)
    teacher, _ = read_model(str(step), "distill.teacher", run_dir=tmp_path, recipe=recipe)
    assert all(teacher[name].equal(average[name]) for name in raw)
    saved = Checkpoint(9, step, 1, {}, ())
    load_start(task, recipe, stage, tmp_path, saved, create_mesh(Parallel()))
    assert all(task.state_dict()[name].equal(raw[name]) for name in both)


@pytest.mark.parametrize(
    ("name", "positions"),
    [("beit3_base", "vision_embed.positions"), ("vlmo_base", "relative_position.table")],
)
def test_weights_of_224_pixels_start_a_stage_of_384(tmp_path, name, positions):
    """With the values that export's resize writes."""
    recipe, key = small(name, 224), f"encoder.{positions}"
    stage, old = replace(recipe.stages["fusion"], init_from=str(tmp_path / "old")), recipe.model
    state = build_task(recipe, stage, tmp_path).state_dict()
    state[key] = torch.randn_like(state[key])  # the table begins as zeros
    write_weights(state, tmp_path / "old" / "weights.safetensors", {"model": to_json(old)})

    def started(**changes) -> dict[str, torch.Tensor]:
        finer = replace(stage, model=replace(old, **changes), transform=replace(stage.transform, size=384))
        return start(recipe, finer, tmp_path)[0].state_dict()

    if old.relative_position:
        expected = state | {key: resize_relative_positions(state[key], 14, 24)}
    else:
        expected = resize_positions(state, old, 384)[0]
    got = started(image_size=384)
    assert got.keys() == expected.keys() and got[key].shape != state[key].shape
    assert all(torch.equal(value, expected[name]) for name, value in got.items())
    for unfit in ({"dim": 24}, {"max_text_len": old.max_text_len + 1}):
        with pytest.raises(ValueError, match=r"has shape \(.* but this stage needs"):
            started(image_size=384, **unfit)


def test_weights_of_another_kind_of_model_are_no_start(tmp_path):
    recipe = small("tiny")
    other = VQKDConfig(dim=16, depth=1, heads=2, decoder_depth=0, image_size=32, patch_size=16, codes=8)
    write_weights({"tokenizer.x": torch.ones(2)}, tmp_path / "vq" / "weights.safetensors", {"model": to_json(other)})
    with pytest.raises(
        ValueError, match=r"init_from=vq: none of .* holds a VQKDConfig and the stage trains a Multiway"
    ):
        start(recipe, replace(recipe.stages["vision"], init_from="vq"), tmp_path)


@pytest.mark.parametrize(("key", "pixels"), [("vision", 32), ("tokenizer", 224)])
def test_pictures_of_another_size_are_refused_before_anything_starts(tmp_path, key, pixels):
    recipe = small("beit3_base")
    stage = replace(recipe.stages[key], transform=replace(recipe.stages[key].transform, size=48))
    with pytest.raises(ValueError, match=rf"transform\.size=48 but model\.image_size={pixels}"):
        build_task(recipe, stage, tmp_path)


@pytest.mark.parametrize(
    ("gpu", "says", "zero", "parallel", "compiled"),
    [
        (True, None, 2, Parallel(), True),
        (True, None, 3, Parallel(), False),  # its hooks cut blocks into pieces
        (True, None, 1, Parallel(tensor=2), False),
        (True, None, 1, Parallel(sequence=2), False),
        (True, False, 1, Parallel(), False),
        (False, None, 1, Parallel(), False),
        (False, True, 1, Parallel(), True),
    ],
)
def test_blocks_are_compiled_by_default_where_there_is_a_gpu(
    monkeypatch, tmp_path, gpu, says, zero, parallel, compiled
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    recipe = small("tiny", 32)
    stage = replace(recipe.stages["fusion"], compile=says, parallel=parallel)
    with torch.device("meta"):
        task = stage.task.build(recipe.model, stage, PLAIN, None)
    config = {"zero_optimization": {"stage": zero}}
    assert compiles(task, stage, config) == compiled
    deep = config | {"compile": {"deepcompile": True}}
    assert compiles(task, stage, deep) == bool(says), "DeepSpeed compiles them; legal.py refuses both"
    assert not compiles(torch.nn.Module(), replace(stage, compile=None), config), "it has no blocks"
