"""The real task through the real train_step: ZeRO on two ranks against one plain torch process."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from pretrain.batch import Batch
from pretrain.distributed import rank, world_size
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim, build_optimizer, learning_rate, schedule
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.step_batches import step_batch

CONFIGS = Path(__file__).parents[1] / "ds_configs"
MODEL = MultiwayConfig(
    dim=32,
    depth=3,
    heads=2,
    ffn_dim=64,
    image_size=16,
    patch_size=4,
    vocab_size=60,
    image_codes=20,
    max_text_len=10,
    fusion_layers=1,
    init_std=0.1,
    drop_path=0.3,
)
OPTIM = Optim(lr=2e-3, warmup_steps=2, weight_decay=0.05, clip=0.5)
STEPS, RANKS = 6, 2
# Each step another mix: all three kinds, then each alone. Global numbers of (images, pairs, texts).
MIXES = ((4, 4, 4), (8, 0, 0), (0, 4, 0), (0, 0, 8), (4, 0, 4), (4, 4, 4))


def task() -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODEL, ("vision", "language", "fusion"), (MaskedData(),))


def micro_batch(step: int, part: int, parts: int) -> Batch:
    """Part `part` of `parts` equal ones of step's global batch."""
    return step_batch(MIXES[step - 1], step, part, parts, depth=MODEL.depth, vocab=MODEL.vocab_size)


def plain() -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    module = task()
    optimizer = build_optimizer(module, OPTIM)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(OPTIM, step, STEPS)
        loss = module(micro_batch(step, 0, 1))["loss"]
        optimizer.zero_grad()
        loss.backward()
        # DeepSpeed's clipping: by norm + 1e-6, as torch's.
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), OPTIM.clip).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, module.state_dict()


def under_deepspeed(config_name: str, accumulation: int):
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, gradient_norm
    from pretrain.parallel.state import full_state
    from pretrain.train import train_step

    module = task()
    config = load_ds_config(
        CONFIGS / config_name, micro=4, accumulation=accumulation, world=world_size(), clip=OPTIM.clip
    )
    engine = build_engine(module, build_optimizer(module, OPTIM), schedule(OPTIM, STEPS), config)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        parts = world_size() * accumulation
        batches = [micro_batch(step, rank() * accumulation + i, parts) for i in range(accumulation)]
        losses.append(train_step(engine, batches, lambda batch: batch)["loss"].item())
        norms.append(gradient_norm(engine))
    return losses, norms, full_state(engine)


def every_config() -> list:
    names = ("zero0.json", "zero1.json", "zero2.json", "zero3.json")
    return [under_deepspeed(name, accumulation) for name in names for accumulation in (1, 2)]


def test_zero_equals_one_process_over_steps_that_mix_kinds():
    losses, norms, state = plain()
    assert any(norm > OPTIM.clip for norm in norms), "clipping must have been active"
    found = run_ranks(every_config, RANKS, timeout=200)
    assert len(found[0]) == 8
    for case in range(8):
        per_rank = [ranks[case][0] for ranks in found]
        mean = [sum(step) / RANKS for step in zip(*per_rank, strict=True)]
        assert max(abs(a - b) for a, b in zip(mean, losses, strict=True)) <= 1e-6, (case, mean, losses)
        for got, want in zip(found[0][case][1], norms, strict=True):
            assert math.isclose(got, want, rel_tol=1e-5), case
        for name, value in found[0][case][2].items():
            assert (value - state[name]).abs().max() <= 1e-6, (case, name)
