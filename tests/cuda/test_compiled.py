"""Compiled blocks on a GPU: the numbers of plain ones, in four graphs whatever the masks and lengths."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from pretrain.batch import PAD, Layout
from pretrain.tasks.pretrain import PretrainTask
from tests.cuda.near import assert_as_near, away, judged
from tests.models.multiway.test_compiled import DEEP, task
from tests.toy_models import PATCHES, random_batch

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(240)]
LAYOUT = Layout(3, 3, 12, PATCHES, pair_len=12, text_len=12)


def batch_of(step: int):
    """Other masks, lengths and draws in each step."""
    batch = random_batch(LAYOUT, step, cfg=DEEP, drop_path=True, padded=False)
    ends = torch.randint(2, 12, (12, 1), generator=torch.Generator().manual_seed(step))
    batch.text_inputs.masked_fill_(torch.arange(12) >= ends, PAD)
    batch.text_masked.masked_fill_(batch.text_inputs == PAD, False)
    return batch.indexed().to("cuda")


def gradients(task: PretrainTask, batch) -> list[torch.Tensor]:
    task.zero_grad()
    report = task(batch)
    report["loss"].backward()
    return [report["loss"].detach()[None], *(value.grad for value in judged(task))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_is_plain_in_four_graphs(dtype: torch.dtype):
    """In bf16 the rows are packed, in fp32 masked."""
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (task().cuda().to(dtype) for _ in range(2))
    exact = task().cuda().to(dtype).float()  # the same numbers
    compiled.encoder.compile_blocks()
    for step in range(1, 6):
        batch = batch_of(step)
        ours, theirs, wanted = (gradients(one, batch) for one in (compiled, plain, exact))
        if dtype == torch.float32:
            assert away(ours, wanted) < 1e-4
        else:
            assert_as_near(ours, theirs, wanted)
    assert counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
