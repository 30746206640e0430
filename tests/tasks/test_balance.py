"""Weights of losses, and each objective's share of the gradient."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
import torch

from pretrain.batch import Kinds
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.matching import Matching
from pretrain.optim import Optim
from pretrain.run.identity import differences, identity_of, stage_hash
from pretrain.run.parameters import check_patterns
from pretrain.tasks.balance import PATIENCE, LossWeights, Ramp, Starvation, with_shares
from pretrain.tasks.pretrain import Pretrain, PretrainTask
from tests.step_batches import MODELS, dual_batch

MODEL, EXPERTS, OBJECTIVES = MODELS["paper"], ("vision", "language", "fusion"), (Contrastive(), Matching())
LOSSES = {"a": torch.tensor(2.0), "b": torch.tensor(3.0)}


def test_fixed_scheduled_and_learned_weights():
    fixed, report = LossWeights(["a", "b"], {"b": 0.25})(LOSSES)
    assert fixed == {"a": 2.0, "b": 0.75} and report == {}

    scheduled = LossWeights(["a", "b"], {"a": Ramp(0.0, 2.0, 4)})
    seen = []
    for _ in range(6):
        parts, report = scheduled(LOSSES)
        seen.append(float(report["weight/a"]))
        assert float(parts["a"]) == 2 * seen[-1] and float(parts["b"]) == 3
        scheduled.after_step()
    assert seen == [0, 0.5, 1, 1.5, 2, 2]
    assert "steps" in scheduled.state_dict() and not LossWeights(["a"], {}).state_dict()

    later = LossWeights(["a", "b"], {"a": Ramp(0.0, 2.0, 4)})
    later.load_state_dict(scheduled.state_dict())  # the weights of the stage before have its steps
    later.begin()
    assert float(later(LOSSES)[1]["weight/a"]) == 0

    learned = LossWeights(["a", "b"], {"b": 0.5}, learned=True)
    with torch.no_grad():
        learned.log_variances["a"].fill_(math.log(4))
    parts, report = learned(LOSSES)
    assert parts["a"].item() == pytest.approx(2 / 4 + math.log(4) / 2) and parts["b"].item() == 1.5
    assert float(report["weight/a"]) == pytest.approx(0.25)
    torch.stack(list(parts.values())).sum().backward()
    # At the best variance, twice the loss, there is no gradient.
    torch.testing.assert_close(learned.log_variances["a"].grad, torch.tensor([-2 / 4 + 0.5]))


def test_a_learned_weight_does_not_outgrow_a_fixed_one():
    """At its best variance a loss weighs half of its inverse, times what the recipe says; while a ramp says 0 there is
    nothing to learn."""
    module = LossWeights(["a", "b"], {"a": 0.25, "b": Ramp(0.0, 1.0, 9)}, learned=True)
    parts, _ = module(LOSSES)
    torch.stack(list(parts.values())).sum().backward()
    assert float(module.log_variances["b"].grad) == 0
    with torch.no_grad():
        module.log_variances["a"].fill_(math.log(2 * 2.0))
    module.zero_grad()
    parts, report = module(LOSSES)
    parts["a"].backward()
    assert abs(float(module.log_variances["a"].grad)) < 1e-7 and float(report["weight/a"]) == pytest.approx(0.25 / 4)


def build(**options) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODEL, EXPERTS, OBJECTIVES, **options)


def outputs_gradients(task: PretrainTask, name: str) -> float:
    """The norm of one objective's gradient at all rows that the encoder gave, by a backward pass of its own."""
    given: list[torch.Tensor] = []

    def retain(module, inputs, rows: Kinds) -> None:
        for kind in rows:
            if kind.requires_grad:
                kind.retain_grad()
                given.append(kind)

    hook = task.encoder.register_forward_hook(retain)
    task(dual_batch(1))
    hook.remove()
    task.last_losses[name].backward()
    return math.sqrt(sum(float(kind.grad.square().sum()) for kind in given if kind.grad is not None))


def test_shares_are_those_of_separate_backward_passes(monkeypatch):
    task = build(weights={"matching": 3.0})
    weigh = task.loss_weights.forward

    def remember(losses):
        parts, report = weigh(losses)
        task.last_losses = parts
        return parts, report

    monkeypatch.setattr(task.loss_weights, "forward", remember)
    norms = {name: outputs_gradients(task, name) for name in ("contrastive", "matching")}
    report = task(dual_batch(1))
    report["loss"].backward()
    line = with_shares({name: value.item() for name, value in report.items()})
    assert not any(key.startswith("gradient/") for key in line)
    for name, norm in norms.items():
        assert line[f"share/{name}"] == pytest.approx(norm / sum(norms.values()), rel=1e-4)
    assert line["share/contrastive"] + line["share/matching"] == pytest.approx(1)


def test_watching_changes_no_number(monkeypatch):
    gradients = []
    for watches in (True, False):
        monkeypatch.setattr(PretrainTask, "watches", watches)
        task = build()
        report = task(dual_batch(1))
        report["loss"].backward()
        gradients.append([report["loss"].detach(), *(value.grad for value in task.parameters())])
        assert any(name.startswith("gradient/") for name in report) == watches
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))
    assert not any(name.startswith("gradient/") for name in task.eval()(dual_batch(1)))


def test_one_objective_is_not_watched():
    task = PretrainTask(MODEL, EXPERTS, (Contrastive(),))
    assert not any(name.startswith(("gradient/", "weight/")) for name in task(dual_batch(1)))


def test_a_starving_objective_is_named_once(caplog):
    watch = Starvation()
    with caplog.at_level(logging.WARNING, "pretrain"):
        for step in range(1, 3 * PATIENCE):
            watch.note(step, {"share/a": 0.99, "share/b": 0.01 if step != 5 else 0.5, "loss": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        f"step {PATIENCE + 5}: the objective b starves: it had less than 2 % of the gradient in the last {PATIENCE} "
        "lines of metrics.jsonl; raise its weight (task.weights.b), or take it out"
    ]


def stage(**task) -> Stage:
    return Stage(
        mix={"dual": PairShards("x", text_len=8)}, batch=BatchSize(dual=4), optim=Optim(), steps=1,
        objectives=OBJECTIVES, task=Pretrain(**task),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"masked": 0.25}, r"task\.weights\.masked is of no objective of this stage; it has contrastive, matching"),
        ({"matching": 0.0}, r"task\.weights\.matching=0\.0 is no weight; use one above 0, or take the objective out"),
    ],
)
def test_weights_that_are_refused(weights, said):
    with pytest.raises(ValueError, match=said):
        Recipe(name="x", model=MODEL, stages={"x": stage(weights=weights)})
    with pytest.raises(ValueError, match=r"is no ramp; use start 0 or more"):
        Ramp(-1.0, 1.0, 3)


def test_learned_weights_are_trained_or_refused():
    frozen = replace(stage(learned=True), trainable=("objectives.*",))
    recipe = Recipe(name="x", model=MODEL, stages={"x": frozen})
    with pytest.raises(ValueError, match=r"keeps task\.learned from learning; add 'loss_weights\.\*'"):
        check_patterns(recipe, frozen)
    check_patterns(recipe, replace(frozen, trainable=("objectives.*", "loss_weights.*")))


def test_runs_that_began_before_there_were_weights_go_on():
    plain = Recipe(name="x", model=MODEL, stages={"x": stage()})
    noted = identity_of(plain, plain.stages["x"])
    noted["task"] = {"class": "Pretrain"}
    assert differences(noted, plain, plain.stages["x"]) == {}
    weighed = stage(weights={"matching": 2.0})
    assert differences(noted, plain, weighed) and stage_hash(plain, weighed) != stage_hash(plain, plain.stages["x"])
