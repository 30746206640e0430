"""Compiled blocks give the numbers of plain ones, and compile a few times only, whatever the masks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pretrain.models.multiway.compiled import compile_blocks
from torch._dynamo.utils import counters

from pretrain.batch import Batch, Layout, make_batch
from pretrain.metrics import read_metrics
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pretrain import PretrainTask
from tests.small_run import Ranks, command, tokenizer_of

STEPS = 5
BEIT3 = MultiwayConfig(
    dim=16,
    depth=7,
    heads=2,
    ffn_dim=32,
    image_size=8,
    patch_size=4,
    vocab_size=24,
    image_codes=8,
    max_text_len=8,
    fusion_layers=3,
    init_std=0.1,
    drop_path=0.3,
    activation_checkpointing=2,
)


def batch(step: int) -> Batch:
    """All kinds, padded; other masks and other dice in each step."""
    made = torch.Generator().manual_seed(step)
    layout = Layout(3, 3, 3, patches=5, pair_len=6, text_len=8)

    def text(length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(4, 24, (3, length), generator=made)
        ids[1, length - 2 :] = 1
        masked = (torch.rand(ids.shape, generator=made) < 0.4) & (ids != 1)
        return {"tokens": ids, "inputs": ids.masked_fill(masked, 23), "masked": masked}

    texts = {f"{kind}_{k}": v for kind, length in (("pair", 6), ("text", 8)) for k, v in text(length).items()}
    return make_batch(
        layout,
        images=torch.randint(256, (6, 3, 8, 8), generator=made, dtype=torch.uint8),
        image_masks=torch.rand(6, 4, generator=made) < 0.5,
        image_codes=torch.randint(8, (6, 4), generator=made),
        noise=torch.rand(9, 2 * BEIT3.depth, generator=made),
        **texts,
    )


def task() -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(BEIT3, ("vision", "language", "fusion"), (MaskedData(),))


@pytest.mark.slow
def test_seven_blocks_compile_three_times_under_changing_masks_and_rates():
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = task(), task()
    compile_blocks(compiled.encoder, backend="aot_eager")  # all of it but the last and slow part, the kernels
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for step in range(1, STEPS + 1):
        for one in (plain, compiled):
            one.zero_grad()
            one(batch(step))["loss"].backward()
        for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-6), name
    # The first block drops nothing, the three fusion blocks have a third expert.
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"] and counters["frames"]["total"] == 3


def with_backend(backend: str, rank: int) -> None:
    from pretrain import train

    def compiling(encoder) -> None:
        print(f"{backend} on rank {rank}", flush=True)
        compile_blocks(encoder, backend)

    train.compile_blocks = compiling


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "backend"), [(2, "aot_eager"), (1, "inductor")])
def test_a_compiled_run_reports_the_losses_of_a_plain_one(data, tmp_path, ranks, backend):
    found = {}
    for compiled in ("false", "true"):
        run, log = tmp_path / compiled, tmp_path / f"{compiled}.log"
        # Of the two blocks one is compiled: each kind of block costs half a minute of the C++ compiler.
        line = command(data, run, "fusion", "steps=3", f"compile={compiled}", tokenizer_of(data), ds="zero1.json")
        cache = str(tmp_path / "inductor")
        started = Ranks(line, data, ranks, log, partial(with_backend, backend), TORCHINDUCTOR_CACHE_DIR=cache)
        assert started.wait(240) == [0] * ranks, log.read_text()
        assert log.read_text().count(f"{backend} on rank") == (ranks if compiled == "true" else 0)
        found[compiled] = read_metrics(run / "fusion" / "metrics.jsonl")
    for plain, other in zip(found["false"], found["true"], strict=True):
        assert other["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert any((tmp_path / "inductor").rglob("*.so")) == (backend == "inductor")
