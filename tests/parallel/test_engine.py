"""The engine over ZeRO-0/1/2/3 on two ranks against one plain torch process."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from pretrain.optim import Optim, build_optimizer, learning_rate, schedule
from tests.distributed import CONTEXT, RankFailed, run_ranks

CONFIGS = Path(__file__).parents[2] / "ds_configs"
OPTIM = Optim(lr=3e-3, min_lr=1e-4, warmup_steps=2, clip=0.05, weight_decay=0.1, layer_decay=0.7)
STEPS, ACCUMULATION, RANKS, WIDTH = 5, 2, 2, 8
LAYERS = {"embed": 0, "vision": 1, "language": 1, "head": 2, "logit_scale": 2}


class Toy(nn.Module):
    """Two experts behind a frozen layer; each runs always, on zero rows if need be, as the Multiway block does."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.vision, self.language = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, 3)
        self.logit_scale = nn.Parameter(torch.full((1,), 0.5))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x_TD, y_T, images: int):
        self.seen += 1
        self.mean.lerp_(torch.ones(WIDTH), 0.1)
        x_TD = self.embed(x_TD.to(self.embed.weight.dtype))
        x_TD = torch.cat([self.vision(x_TD[:images]), self.language(x_TD[images:])])
        logits = self.head(self.dropout(x_TD.tanh())) * self.logit_scale.exp()
        return nn.functional.cross_entropy(logits.float(), y_T)


def micro_batches(step: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Every micro-batch of the step, rank by rank: images only, texts only, or both."""
    made = torch.Generator().manual_seed(step)
    count = RANKS * ACCUMULATION
    rows = 5 * torch.randn(count, 4, WIDTH, generator=made), torch.randint(3, (count, 4), generator=made)
    return [(rows[0][i], rows[1][i], (0, 4, 2)[(step + i % ACCUMULATION) % 3]) for i in range(count)]


def layer_of(name: str) -> int:
    return LAYERS[name.split(".")[0]]


def plain() -> tuple[dict, list[float], list[float]]:
    task = Toy()
    optimizer = build_optimizer(task, OPTIM, layer_of=layer_of)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(OPTIM, STEPS))
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        loss = torch.stack([task(*batch) for batch in micro_batches(step)]).mean()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(task.parameters(), OPTIM.clip)))
        optimizer.step()
        rates.step()
        losses.append(float(loss.detach()))
    return {name: value.clone() for name, value in task.state_dict().items()}, losses, norms


def engine_runs(names: list[str]) -> dict[str, tuple]:
    """Of each config on this rank: final weights (rank 0), mean losses, norms, rates."""
    from pretrain.distributed import rank, reduce_mean
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine
    from pretrain.parallel.skipping import gradient_norm
    from pretrain.parallel.state import full_state

    runs = {}
    for name in names:
        config = load_ds_config(CONFIGS / name, micro=4, accumulation=ACCUMULATION, world=RANKS, clip=OPTIM.clip)
        task = Toy()
        engine = build_engine(task, build_optimizer(task, OPTIM, layer_of=layer_of), schedule(OPTIM, STEPS), config)
        losses, norms, rates = [], [], []
        for step in range(1, STEPS + 1):
            mine = micro_batches(step)[rank() * ACCUMULATION : (rank() + 1) * ACCUMULATION]
            rates.append(max(engine.get_lr()))
            step_losses = []
            for batch in mine:
                loss = engine(*batch)
                engine.backward(loss)
                engine.step()
                step_losses.append(loss.detach())
            losses.append(reduce_mean({"loss": torch.stack(step_losses).mean()})["loss"])
            norms.append(float(gradient_norm(engine)))
        runs[name] = (full_state(engine), losses, norms, rates)
    return runs


def test_zero_equals_one_plain_process():
    fp32 = ["zero0.json", "zero1.json", "zero2.json", "zero3.json"]
    bf16 = ["zero1_bf16.json", "zero2_bf16.json", "zero3_bf16.json"]
    weights, losses, norms = plain()
    first, second = run_ranks(engine_runs, RANKS, fp32 + bf16, timeout=60)
    assert min(norms) > OPTIM.clip, "clipping must be active in this test"
    start = Toy().state_dict()
    assert (weights["vision.weight"] - start["vision.weight"]).abs().max() > 1e-3, "the test must move the weights"
    for name, (state, engine_losses, engine_norms, rates) in first.items():
        assert second[name][0] == {}
        assert list(state) == list(weights), name
        loose = 30 if name in bf16 else 1
        assert engine_losses == pytest.approx(losses, abs=1e-6 if loose == 1 else 2e-2), name
        assert engine_norms == pytest.approx(norms, rel=1e-5 if loose == 1 else 3e-2), name
        assert rates == pytest.approx([learning_rate(OPTIM, step, STEPS) for step in range(1, STEPS + 1)]), name
        for key, value in weights.items():
            assert state[key].dtype == value.dtype, (name, key)
            if key not in ("seen", "mean"):
                near = 1e-6 if loose == 1 else 6e-3
                assert (state[key] - value).abs().max() <= near, (name, key, (state[key] - value).abs().max())
        # Buffers come along; each rank counted its own micro-steps.
        assert state["seen"] == STEPS * ACCUMULATION
        assert state["mean"][0] == pytest.approx(1 - 0.9 ** (STEPS * ACCUMULATION))
        frozen = start["embed.weight"] if loose == 1 else start["embed.weight"].bfloat16().float()
        assert torch.equal(state["embed.weight"], frozen), name


def one_step_without_clip() -> tuple[float, float]:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine
    from pretrain.parallel.skipping import gradient_norm

    config = load_ds_config(CONFIGS / "zero0.json", micro=4, accumulation=1, world=1, clip=0.0)
    task = Toy()
    engine = build_engine(task, build_optimizer(task, OPTIM, layer_of=layer_of), schedule(OPTIM, 3), config)
    before = float(gradient_norm(engine))
    engine.backward(engine(*micro_batches(1)[0]))
    engine.step()
    return before, float(gradient_norm(engine))


def test_the_norm_is_measured_without_clipping_too():
    ((before, after),) = run_ranks(one_step_without_clip, 1)
    assert math.isnan(before)
    assert after > 0


def alone(fn: Callable, env: dict[str, str]):
    """What `fn` returns in a process of its own that no launcher started."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        return pool.submit(_with_environment, fn, env).result(timeout=60)


def _with_environment(fn: Callable, env: dict[str, str]):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MASTER_", "RANK", "WORLD_", "LOCAL_"))]:
        del os.environ[name]
    os.environ.update(env, CUDA_VISIBLE_DEVICES="")
    return fn()


def join(timeout_s: float = 30.0) -> tuple[int, int]:
    import torch.distributed as dist

    from pretrain.parallel.engine import init_distributed

    init_distributed(timeout_s)
    dist.all_reduce(torch.ones(1))
    return dist.get_rank(), dist.get_world_size()


def join_in_a_second() -> tuple[int, int]:
    return join(1.0)


def test_a_plain_process_is_a_world_of_one():
    assert alone(join, {}) == (0, 1)
    assert alone(join, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}) == (0, 1)


def test_ranks_that_do_not_come_are_an_error_in_time():
    env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"rank 1 of 2.*within 1 s.*MASTER_ADDR=127.0.0.1"):
        alone(join_in_a_second, env)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(("visible", "rank", "gpu"), [(1, 3, 0), (4, 3, 3), (4, 0, 0)])
def test_deepspeed_takes_the_gpu_that_torch_took(monkeypatch, visible, rank, gpu):
    """A launcher may show each rank one GPU only."""
    from pretrain.parallel import engine

    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    for _ in range(2):  # evaluation joins again
        engine._take_device()
    assert taken == [torch.device("cuda", gpu)] * 2 and os.environ["LOCAL_RANK"] == str(gpu)


def test_srun_needs_a_meeting_point():
    with pytest.raises(ValueError, match="MASTER_ADDR is not set under srun"):
        alone(join, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"})


def die(rank_that_dies: int) -> None:
    import torch.distributed as dist

    if dist.get_rank() == rank_that_dies:
        raise KeyError("boom")
    dist.barrier()


def test_run_ranks_raises_the_failing_ranks_traceback():
    with pytest.raises(RankFailed, match=r"rank 1:(.|\n)*KeyError: 'boom'"):
        run_ranks(die, 2, 1)


def masters_after_start() -> list[tuple[str, float]]:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine
    from pretrain.parallel.state import full_state

    errors = []
    for name in ("zero1_bf16.json", "zero2_bf16.json", "zero3_bf16.json"):
        task = Toy()
        want = {key: value.detach().clone() for key, value in task.named_parameters() if value.requires_grad}
        config = load_ds_config(CONFIGS / name, micro=4, accumulation=1, world=RANKS, clip=0)
        engine = build_engine(task, build_optimizer(task, OPTIM, layer_of=layer_of), schedule(OPTIM, STEPS), config)
        state = full_state(engine)
        assert next(engine.module.parameters()).dtype == torch.bfloat16
        errors.append(
            (name, max(float((state[key] - value).abs().max()) for key, value in want.items()) if state else 0)
        )
    return errors


def test_bf16_masters_begin_with_the_bits_that_were_handed_over():
    for name, error in run_ranks(masters_after_start, RANKS)[0]:
        assert error == 0, name


DEEP = {"compile": {"deepcompile": True}}


@pytest.mark.parametrize(
    ("gpu", "loads", "says"),
    [
        (False, None, "needs a GPU, and there is none here; remove compile from the JSON"),
        (
            True,
            "ninja is required\nand more",
            "extension, .*RuntimeError: ninja is required\\); install them, or remove",
        ),
        (True, ImportError, "deepspeed .* has no DeepCompile; remove compile from the JSON"),
        (True, None, None),
    ],
)
def test_deepcompile_is_refused_in_one_sentence_where_there_is_none(monkeypatch, tmp_path, gpu, loads, says):
    """DeepSpeed ends with a traceback there."""
    from pretrain.parallel import engine

    engine.preload()
    dc = importlib.import_module("deepspeed.ops.op_builder.dc")
    loaded = []

    def load(self) -> None:
        if loads:
            raise RuntimeError(loads)
        loaded.append(self.name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    if loads is ImportError:
        monkeypatch.delattr(dc, "DeepCompileBuilder")
    else:
        monkeypatch.setattr(dc.DeepCompileBuilder, "load", load)
    engine.check_deepcompile({})
    assert not loaded
    if says is None:
        engine.check_deepcompile(DEEP)
        assert loaded == ["dc"]
        return
    with pytest.raises(ValueError, match=says) as refused:
        engine.check_deepcompile(DEEP)
    assert "\n" not in str(refused.value)


def compile_calls() -> list[int]:
    """Of DeepSpeed's engines that are built without and with DeepCompile, which no CPU has."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine

    calls: list[str] = []
    DeepSpeedEngine.compile = lambda self: calls.append("compile")
    counts = []
    for more in ({}, DEEP):
        config = load_ds_config(CONFIGS / "zero1.json", micro=4, accumulation=1, world=1, clip=1.0) | more
        task = Toy()
        build_engine(task, build_optimizer(task, OPTIM, layer_of=layer_of), schedule(OPTIM, STEPS), config)
        counts.append(len(calls))
    return counts


def test_an_engine_compiles_where_the_json_says_so():
    assert run_ranks(compile_calls, 1) == [[0, 1]]


def test_a_start_does_not_import_torchs_compiler():
    """DeepSpeed would by its Muon, which it imports with every engine: a second."""
    code = "import sys; from pretrain.parallel.engine import _deepspeed; _deepspeed(); "
    code += "import deepspeed.runtime.zero.muon.muon_optimizer; print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIGS.parent, check=True)
    assert done.stdout == "False\n"
