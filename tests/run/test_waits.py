"""A step asks the device for nothing: every count and every index is known on the host before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.calls import Calls, on_device
from pretrain.batch import Layout
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.momentum import MomentumContrast
from pretrain.run.step import train_step
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import CODES, CONFIGS, EXPERTS, PATCHES, random_batch

LAYOUT = Layout(4, 3, 5, PATCHES, pair_len=12, text_len=12, dual=2)
MASKED = MaskedData(image_codes=CODES)
OBJECTIVES = {
    "masked": (MASKED,),
    "masked by targets": (MaskedData(image_codes=CODES, mean_over="targets", tied_text_head=True),),
    "with contrast": (MaskedData(image_codes=CODES, dual=False), Contrastive()),
    "with captions": (MASKED, Captioning(smoothing=0.1)),
    "with a teacher": (MomentumContrast(embed_dim=8, queue=4),),
}


class Plain:
    """An engine that waits for nothing itself."""

    def __init__(self, task: Any):
        self.module = task

    def __call__(self, batch: Any) -> dict[str, torch.Tensor]:
        return self.module(batch)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        """The optimizer's is DeepSpeed's."""


def step(name: str, objectives: str, device: str = "cpu") -> tuple[PretrainTask, list]:
    torch.manual_seed(0)
    options = {"drop_path": 0.2, "checkpointing": 1}
    task = PretrainTask(CONFIGS[name], EXPERTS, OBJECTIVES[objectives], **options).to(device)
    batches = [random_batch(LAYOUT, seed, drop_path=True) for seed in range(2)]
    return task, [on_device(batch) if device == "cpu" else batch.indexed().to(device) for batch in batches]


@pytest.mark.parametrize("objectives", OBJECTIVES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_waits_for_nothing(name, objectives):
    task, batches = step(name, objectives)
    there = [value for batch in batches for value in batch.every_tensor()]
    with Calls([*task.parameters(), *task.buffers(), *there]) as calls:
        report = train_step(Plain(task), batches, lambda batch: batch)
    assert calls.waits.total() == 0, calls.waits
    assert report["loss"].isfinite()


@pytest.mark.parametrize(
    "asks",
    [
        lambda value: value.sum().item(),
        lambda value: value.tolist(),
        lambda value: value[value > 0],
        lambda value: (value > 0).nonzero(),
        lambda value: bool((value * 2).all()),
        lambda value: torch.zeros(3).index_put_((value > 0,), torch.tensor(1.0)),
    ],
)
def test_what_would_wait_is_counted(asks):
    value, host = torch.tensor([1.0, -1, 2]), torch.tensor([1.0, -1, 2])
    with Calls([value]) as calls:
        asks(host)
        assert calls.waits.total() == 0
        asks(value)
    assert calls.waits.total() >= 1


@pytest.mark.cuda
@pytest.mark.parametrize("objectives", OBJECTIVES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_on_a_gpu_waits_for_nothing(name, objectives):
    task, batches = step(name, objectives, "cuda")
    train_step(Plain(task), batches, lambda batch: batch)  # fills caches
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(Plain(task), batches, lambda batch: batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
