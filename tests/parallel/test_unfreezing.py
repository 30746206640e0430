"""A part that is trained from a later step on, and the running average of the weights: under ZeRO as in one process,
and the same bits after a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.save import average_in, newest, resume
from pretrain.checkpoint.weights import load_handover
from pretrain.optim import Optim, build_optimizer, described, learning_rate, parameter_groups, schedule
from pretrain.parallel.average import Ema, average_in_place, begin_average, follow
from pretrain.parallel.unfreezing import Unfreezing, rates
from tests.checkpoint.test_save import run_steps, whole_save
from tests.distributed import run_ranks
from tests.parallel.test_engine import CONFIGS, Toy, micro_batches

OPTIM = Optim(lr=3e-3, min_lr=1e-4, warmup_steps=2, clip=0.05, weight_decay=0.1, factors={"head.*": 0.5})
STEPS, HALF, EMA = 6, 3, Ema(0.6)
FIRSTS = {"vision.weight": 5, "vision.bias": 5, "language.weight": 3, "language.bias": 3}


def make_engine(name: str, checkpoint=None, firsts: dict[str, int] | None = None):
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine

    firsts = FIRSTS if firsts is None else firsts
    config = load_ds_config(CONFIGS / name, micro=4, accumulation=2, world=2, clip=OPTIM.clip)
    task = Toy()
    if checkpoint is not None:
        with torch.no_grad():
            for value in (*task.parameters(), task.mean):
                value += 1  # nothing may be right by itself after a restore
        load_handover(task, checkpoint.weights)
    engine = build_engine(task, build_optimizer(task, OPTIM, first_steps=firsts), schedule(OPTIM, STEPS), config)
    begin_average(engine)
    if checkpoint is not None:
        resume(engine, checkpoint)
    return engine, Unfreezing(engine, firsts)


def go(engine, unfreezing: Unfreezing, first: int, last: int, root: Path | None = None) -> list[dict]:
    """The weights after each step, and the average at the end; `root`: where to save after each."""
    from pretrain.parallel.state import full_state

    states = []
    for step in range(first, last + 1):
        unfreezing.begin_step()
        run_steps(engine, step, step)
        follow(engine, EMA.share(step))
        states.append(full_state(engine))
        if root is not None and step in (HALF, STEPS):
            whole_save(engine, root, step)
    with average_in_place(engine):
        states.append(full_state(engine))
    assert all(torch.equal(value, states[-2][name]) for name, value in full_state(engine).items()), "swapped back"
    return states


def on_ranks(names: list[str], root: str) -> dict:
    results = {}
    for name in names:
        place = Path(root) / name
        whole = go(*make_engine(name), 1, STEPS, place if name != "zero0.json" else None)
        halves = []
        if name != "zero0.json":
            precision = "bf16" if "bf16" in name else "fp32"
            checkpoint = newest(place, precision=precision, step=HALF)  # one part has begun there, and one has not
            halves = go(*make_engine(name, checkpoint), checkpoint.step + 1, STEPS)
        results[name] = whole, halves
    return results


def alone() -> list[dict]:
    """Plain torch: each part gets an optimizer of its own in the step in which it is trained first."""
    task, ends = Toy(), []
    parameters = dict(task.named_parameters())
    optimizers: dict[int, torch.optim.Optimizer] = {}
    average = {name: value.detach().clone() for name, value in parameters.items()}
    for step in range(1, STEPS + 1):
        names = {name for name in parameters if parameters[name].requires_grad and FIRSTS.get(name, 1) <= step}
        for first in {FIRSTS.get(name, 1) for name in names} - optimizers.keys():
            optimizers[first] = build_optimizer(_only(task, {n for n in names if FIRSTS.get(n, 1) == first}), OPTIM)
        task.zero_grad()
        for batch in micro_batches(step):
            (task(*batch) / len(micro_batches(step))).backward()
        for name, value in parameters.items():
            if name not in names:
                value.grad = None
        torch.nn.utils.clip_grad_norm_([parameters[name] for name in names], OPTIM.clip)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                factor = group.setdefault("factor", group["lr"] / OPTIM.lr)
                group["lr"] = factor * learning_rate(OPTIM, step, STEPS)
            optimizer.step()
        for name, value in parameters.items():
            average[name].lerp_(value.detach(), EMA.share(step))
        ends.append({name: value.detach().clone() for name, value in parameters.items()})
    return [*ends, average]


def _only(task: Toy, names: set[str]) -> torch.nn.Module:
    """The task as parameter_groups sees it where only these are open."""

    class View(torch.nn.Module):
        def named_parameters(self, *_, **__):  # type: ignore[override]
            return ((name, value) for name, value in task.named_parameters() if name in names)

    return View()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[dict, Path]:
    names = [*(f"zero{stage}.json" for stage in range(4)), "zero1_bf16.json"]
    root = tmp_path_factory.mktemp("unfreezing")
    return run_ranks(on_ranks, 2, names, str(root), timeout=280)[0], root


@pytest.mark.slow
def test_each_step_is_that_of_an_optimizer_that_met_the_part_then(ranks):
    wanted = alone()
    start = dict(Toy().named_parameters())
    for name, (states, _) in ranks[0].items():
        for step, (state, want) in enumerate(zip(states, wanted, strict=True), 1):
            for key, value in want.items():
                if key in FIRSTS and step < FIRSTS[key]:
                    assert torch.equal(state[key], start[key]), f"{name}: {key} waits in step {step}"
                if "bf16" not in name:  # its rounded gradients may have another sign, which is AdamW's first step
                    torch.testing.assert_close(state[key], value, atol=2e-6, rtol=0, msg=f"{name} {key} {step}")
        assert all(not torch.equal(states[-2][key], start[key]) for key in FIRSTS), name


@pytest.mark.slow
def test_a_resume_between_their_steps_changes_no_bit_of_weights_and_average(ranks):
    for name, (states, halves) in ranks[0].items():
        assert name == "zero0.json" or len(halves) == STEPS - HALF + 1
        for state, again in zip(states[-len(halves) :] if halves else (), halves, strict=True):
            assert all(torch.equal(state[key], again[key]) for key in state), name


@pytest.mark.slow
def test_a_checkpoint_holds_the_average_whole(ranks):
    results, root = ranks
    for name in ("zero1.json", "zero3.json", "zero1_bf16.json"):
        last = max((root / name).glob("step_*"))
        average, states = average_in(last), results[name][0]
        assert set(average) == {key for key, value in Toy().named_parameters() if value.requires_grad}
        assert all(torch.equal(value, states[-1][key]) for key, value in average.items()), name


def test_groups_say_their_factor_and_their_step():
    task = Toy()
    groups = parameter_groups(task, OPTIM, first_steps=FIRSTS)
    assert [group.get("first_step", 1) for group in groups] == [1, 1, 1, 3, 3, 5, 5]
    rate = {id(value): group["lr"] / OPTIM.lr for group in groups for value in group["params"]}
    assert rate[id(task.head.weight)] == 0.5 == rate[id(task.head.bias)] and rate[id(task.vision.weight)] == 1
    assert "at 0.5 x lr, decay 0.1; " in (said := described(groups, OPTIM)) and said.endswith(" and 1 more")
    factors = rates(groups, lambda done: 0.25)
    assert [[each(done) for done in (0, 1, 2, 4)] for each in (factors[0], factors[3], factors[-1])] == [
        [0.25] * 4, [0, 0, 0.25, 0.25], [0, 0, 0, 0.25],
    ]  # fmt: skip


def test_the_averages_share_rises_to_what_the_decay_says():
    assert Ema(0.9999).share(1) == pytest.approx(9 / 11) and Ema(0.9999).share(10**6) == pytest.approx(1e-4)
    assert Ema(0.9, warmup=False).share(1) == pytest.approx(0.1)
    for wrong in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"ema\.decay={wrong} must lie between 0 and 1"):
            Ema(wrong)
    with pytest.raises(ValueError, match=r"optim\.factors\.a=0 must be above 0; to freeze a part, use trainable"):
        Optim(factors={"a": 0})
