"""Adapters: peft's numbers, the frozen layer's at first, a merge that changes nothing, and ZeRO against one process."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.checkpoint.weights import LORA, load_handover, read_weights, write_weights
from pretrain.config import BatchSize, Recipe, Stage, to_json
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.data.transforms import ImageTransform
from pretrain.models.lora import Lora, LoraLinear, add_adapters, is_adapter, merged
from pretrain.objectives.self_distillation import SelfDistillation
from pretrain.optim import Optim
from pretrain.parallel.sizes import Parallel
from pretrain.run.build import build_task, check_model
from pretrain.run.parameters import frozen_names
from tests.distributed import run_ranks
from tests.step_batches import CONFIGS, MASKED, PAPER, Trained, mean_reports, step_batch, train_alone, train_on_ranks
from tests.toy_models import RELEASED, encoder

LORA_ = Lora(rank=2, alpha=6.0, targets=("*.attention.q.*", "*.experts.*.down"))
MIX, STEPS = (4, 4, 4), 4
STAGE = Stage(
    mix={"images": ImageShards("x"), "pairs": PairShards("x", text_len=8), "texts": TextShards("x", text_len=10)},
    batch=BatchSize(4, 4, 4), optim=Optim(lr=3e-2, warmup_steps=1, clip=0.5), steps=STEPS, objectives=(MASKED,),
    transform=ImageTransform(size=16), init_from="elsewhere", lora=LORA_,
)  # fmt: skip
RECIPE = Recipe("adapted", PAPER, {"adapted": STAGE})


def moved(module: nn.Module) -> None:
    """Away from the zeros with which adapters begin."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            if is_adapter(name):
                value.add_(torch.randn_like(value) * 0.1)


def test_an_adapted_layer_is_the_layer_at_first_and_then_the_sum():
    torch.manual_seed(0)
    plain, rows = nn.Linear(5, 3), torch.randn(4, 5)
    wanted = plain(rows)
    one = LoraLinear(plain, LORA_)
    assert torch.equal(one(rows), wanted) and one.weight is plain.weight
    assert one(rows[:0]).shape == (0, 3) and one.lora_down.abs().max() <= 5**-0.5
    moved(one)
    torch.testing.assert_close(one(rows), wanted + 3.0 * rows @ one.lora_down.T @ one.lora_up.T)


def test_its_numbers_are_pefts():
    """Where peft is installed, which neither the suite nor training needs."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))
    ours = nn.Sequential(*(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4)))
    ours.load_state_dict(theirs.state_dict())
    add_adapters(ours, Lora(rank=2, alpha=6.0, targets=("*.0", "*.2")))
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"])
    theirs = peft.inject_adapter_in_model(config, theirs)
    for name in "02":
        own, other = ours.get_submodule(name), theirs.get_submodule(name)
        assert other.lora_B["default"].weight.abs().max() == 0 == own.lora_up.abs().max()
        bound = own.in_features**-0.5
        for first in (own.lora_down, other.lora_A["default"].weight):
            assert 0.5 * bound < first.abs().max() <= bound
        moved(own)
        with torch.no_grad():
            other.lora_A["default"].weight.copy_(own.lora_down)
            other.lora_B["default"].weight.copy_(own.lora_up)
    rows = torch.randn(3, 6)
    torch.testing.assert_close(ours(rows), theirs(rows))
    ours(rows).square().sum().backward()
    theirs(rows).square().sum().backward()
    torch.testing.assert_close(ours[0].lora_down.grad, theirs.get_submodule("0").lora_A["default"].weight.grad)
    whole = merged(ours.state_dict(), to_json(Lora(2, 6.0)))
    theirs.get_submodule("0").merge()
    torch.testing.assert_close(whole["0.weight"], theirs.get_submodule("0").base_layer.weight)


@pytest.mark.parametrize("cfg", [PAPER, RELEASED], ids=["paper", "released"])
def test_merging_changes_no_output(cfg, tmp_path):
    layer = encoder(cfg)
    before = set(layer.state_dict())
    add_adapters(layer, LORA_)
    moved(layer)
    state = layer.state_dict()
    assert before < set(state) and before | {name for name in state if is_adapter(name)} == set(state)
    batch = step_batch(MIX, 1, 0, 1) if cfg is PAPER else None
    whole = encoder(cfg, seed=1)
    whole.load_state_dict(merged(state, to_json(LORA_)))
    if batch is not None:
        for one, other in zip(layer(batch.indexed()), whole(batch.indexed()), strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    # A checkpoint keeps them apart; whoever reads it for its weights gets them merged.
    write_weights(state, tmp_path / "weights.safetensors", {LORA: to_json(LORA_), "n": 1})
    read, config = read_weights(tmp_path)
    assert config == {"n": 1} and set(read) == before
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in read.items())
    assert load_handover(layer, tmp_path).missing == []
    with pytest.raises(ValueError, match="whose adapters are not added to its weights; give the weights"):
        load_handover(encoder(cfg), tmp_path)
    write_weights({name: v for name, v in state.items() if not name.endswith("up")}, tmp_path / "weights.safetensors",
                  {LORA: to_json(LORA_)})  # fmt: skip
    with pytest.raises(ValueError, match="adapters do not fit its weights"):
        read_weights(tmp_path)


def train_adapted(names: list[str]) -> list[Trained]:
    from pretrain.optim import build_optimizer, schedule
    from pretrain.parallel.engine import build_engine, partitioned_init
    from pretrain.parallel.mesh import create_mesh
    from pretrain.run.build import stage_ds_config

    runs = []
    for name in names:
        config = stage_ds_config(str(CONFIGS / name), RECIPE, STAGE)
        task = build_task(RECIPE, STAGE, Path(), context=partitioned_init(config))
        engine = build_engine(task, build_optimizer(task, STAGE.optim), schedule(STAGE.optim, STEPS), config)
        runs.append(train_on_ranks(engine, create_mesh(Parallel()), partial(step_batch, MIX), STEPS))
    return runs


def test_zero_0_to_3_train_adapters_as_one_process_does():
    task = build_task(RECIPE, STAGE, Path())
    before = {name: value.clone() for name, value in task.state_dict().items()}
    alone = train_alone(task, STAGE.optim, [step_batch(MIX, step, 0, 1) for step in range(1, STEPS + 1)])
    changed = {name for name, value in alone.weights.items() if not torch.equal(value, before[name])}
    assert changed == set(before) - frozen_names(RECIPE, STAGE) and all(
        is_adapter(name) for name in changed if name.startswith("encoder.")
    )
    assert any(is_adapter(name) for name in changed)
    ranks = run_ranks(train_adapted, 2, names := [f"zero{stage}.json" for stage in range(4)])
    for number, name in enumerate(names):
        runs = [own[number] for own in ranks]
        for own, want in zip(mean_reports(runs), alone.reports, strict=True):
            assert abs(own["loss"] - want["loss"]) < 2e-6, name
        torch.testing.assert_close(runs[0].weights, alone.weights, atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Lora(rank=0), r"lora\.rank=0 is below 1"),
        (lambda: Lora(alpha=float("nan")), r"lora\.alpha=nan must be above 0"),
        (lambda: Lora(targets=()), r"lora\.targets is empty"),
        (lambda: replace(STAGE, init_from=None), "it begins at random; set init_from"),
        (lambda: replace(STAGE, parallel=Parallel(tensor=2)), r"does not go with parallel\.tensor=2"),
        (lambda: replace(STAGE, objectives=(SelfDistillation(),)), "lora does not go with self_distillation, whose"),
        (
            lambda: check_model(RECIPE, replace(STAGE, trainable=("objectives.*",))),
            "leaves no adapter of lora to train",
        ),
        (
            lambda: check_model(RECIPE, replace(STAGE, lora=Lora(targets=("*.key",)))),
            r"lora\.targets='\*\.key' matches no linear layer of the encoder; names look like 'encoder\.",
        ),
    ],
)
def test_what_does_not_go_with_it_is_said(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
