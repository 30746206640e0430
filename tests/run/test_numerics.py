"""What a recipe says about a GPU's arithmetic is set for the process, is no part of what a run is, and changes nothing
on a CPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from pretrain.run.identity import identity_of
from pretrain.run.numerics import set_numerics
from tests.run.test_identity import RECIPE, VISION
from tests.test_parity import OPTIM, micro_batch, task, train_alone


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_the_knobs_reach_torch():
    set_numerics(replace(RECIPE, tf32=True, deterministic=True))
    assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
    assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    set_numerics(RECIPE)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("changes", [{"tf32": True}, {"deterministic": True}], ids=str)
def test_they_are_no_part_of_what_a_run_is(changes):
    assert identity_of(replace(RECIPE, **changes), VISION) == identity_of(RECIPE, VISION)


def test_a_training_step_has_only_operators_that_torch_calls_deterministic_and_the_same_numbers_here():
    """Forward, backward and AdamW; on a CPU torch refuses fewer operators than on a GPU."""
    reports = []
    for deterministic in (False, True):
        set_numerics(replace(RECIPE, deterministic=deterministic))
        reports.append(train_alone(task(), OPTIM, [micro_batch(step, 0, 1) for step in (1, 2)]))
    assert reports[0].reports == reports[1].reports and reports[0].norms == reports[1].norms
