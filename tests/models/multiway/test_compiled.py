"""Compiled blocks give the numbers of plain ones, and compile a few times only, whatever the masks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from pretrain.batch import PAD, Layout
from pretrain.metrics import read_metrics
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pretrain import PretrainTask
from tests.small_run import Ranks, command, tokenizer_of
from tests.toy_models import CODES, EXPERTS, PAPER, PATCHES, random_batch

STEPS = 5
DEEP = replace(PAPER, depth=7, fusion_layers=3, init_std=0.1)


def task() -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(DEEP, EXPERTS, (MaskedData(image_codes=CODES),), drop_path=0.3, checkpointing=2)


@pytest.mark.slow
def test_seven_blocks_compile_four_times_under_changing_masks_lengths_and_rates():
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = task(), task()
    compiled.encoder.compile_blocks(backend="aot_eager")  # all of it but the last and slow part, the kernels
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    shapes = set()
    for step in range(1, STEPS + 1):
        # Other masks, lengths and draws in each step.
        layout = Layout(3, 3, 12, PATCHES, pair_len=12, text_len=12)
        batch = random_batch(layout, step, cfg=DEEP, drop_path=True, padded=False)
        ends = torch.randint(2, 12, (12, 1), generator=torch.Generator().manual_seed(step))
        batch.text_inputs.masked_fill_(torch.arange(12) >= ends, PAD)
        batch.text_masked.masked_fill_(batch.text_inputs == PAD, False)
        batch = batch.indexed()
        shapes.add(batch.index.real.counts)
        for one in (plain, compiled):
            one.zero_grad()
            one(batch)["loss"].backward()
        for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    # The first block drops nothing, the three fusion blocks have a third expert, the last leaves rows out.
    assert len(shapes) > 2 and counters["stats"]["unique_graphs"] == 4
    assert not counters["graph_break"] and counters["frames"]["total"] == 4


def with_backend(backend: str, rank: int) -> None:
    compile_blocks = MultiwayEncoder.compile_blocks

    def compiling(encoder: MultiwayEncoder) -> None:
        print(f"{backend} on rank {rank}", flush=True)
        compile_blocks(encoder, backend)

    MultiwayEncoder.compile_blocks = compiling


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "backend"), [(2, "aot_eager"), (1, "inductor")])
def test_a_compiled_run_reports_the_losses_of_a_plain_one(data, tmp_path, ranks, backend):
    metrics = {}
    for compiled in ("false", "true"):
        run, log = tmp_path / compiled, tmp_path / f"{compiled}.log"
        line = command(data, run, "fusion", "steps=3", f"compile={compiled}", tokenizer_of(data), ds="zero1.json")
        cache = str(tmp_path / "inductor")
        started = Ranks(line, data, ranks, log, partial(with_backend, backend), TORCHINDUCTOR_CACHE_DIR=cache)
        assert started.wait(240) == [0] * ranks, log.read_text()
        assert log.read_text().count(f"{backend} on rank") == (ranks if compiled == "true" else 0)
        metrics[compiled] = read_metrics(run / "fusion" / "metrics.jsonl")
    for plain, other in zip(metrics["false"], metrics["true"], strict=True):
        assert other["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert any((tmp_path / "inductor").rglob("*.so")) == (backend == "inductor")
