"""A step whose gradients are not finite: what it moves, what the schedule does, and what a good step costs."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.optim import build_optimizer, learning_rate, schedule
from tests.distributed import run_ranks
from tests.parallel.test_engine import CONFIGS, OPTIM, STEPS, Toy, layer_of, micro_batches

BAD = 3


def build(name: str, accumulation: int = 1, world: int = 1):
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine

    config = load_ds_config(CONFIGS / name, micro=4, accumulation=accumulation, world=world, clip=OPTIM.clip)
    task = Toy()
    return build_engine(task, build_optimizer(task, OPTIM, layer_of=layer_of), schedule(OPTIM, STEPS), config)


def runs_with_a_bad_step(names: list[str]) -> dict[str, tuple]:
    """Of each config: rates and norms of the steps, counts of skipped ones, weights before and after the bad one."""
    from pretrain.distributed import rank
    from pretrain.parallel.skipping import gradient_norm, skipped_steps
    from pretrain.parallel.state import full_state

    runs = {}
    for name in names:
        engine, rates, norms, counts, weights = build(name, world=2), [], [], [], []
        for step in range(1, STEPS + 1):
            rates.append(max(engine.get_lr()))
            x_TD, y_T, images = micro_batches(step)[rank()]
            # One number of one rank's batch.
            x_TD[0, 0] = float("nan") if step == BAD and rank() == 1 else x_TD[0, 0]
            engine.backward(engine(x_TD, y_T, images))
            engine.step()
            norms.append(float(gradient_norm(engine)))
            counts.append(skipped_steps(engine, step))
            weights.append({key: value for key, value in full_state(engine).items() if key not in ("seen", "mean")})
        runs[name] = (rates, norms, counts, weights)
    return runs


def test_a_step_that_is_not_finite_moves_nothing_and_the_schedule_goes_on():
    fp32 = [f"zero{stage}.json" for stage in range(4)]
    names = [*fp32, *(f"zero{stage}_bf16.json" for stage in (1, 2, 3)), "zero2_offload.json"]
    first, second = run_ranks(runs_with_a_bad_step, 2, names, timeout=100)
    for name, (rates, norms, counts, weights) in first.items():
        assert rates == pytest.approx([learning_rate(OPTIM, step, STEPS) for step in range(1, STEPS + 1)]), name
        assert counts == [0, 0, 1, 1, 1] == second[name][2], name
        assert [norm < 1e3 for norm in norms] == [True, True, False, True, True], (name, norms)
        before, after, last = weights[BAD - 2], weights[BAD - 1], weights[-1]
        for key, value in before.items():
            assert torch.equal(value, after[key]), (name, key)
            assert last[key].isfinite().all(), (name, key)
        assert not torch.equal(before["head.weight"], last["head.weight"]), name


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.counts[call.overloadpacket.__name__] += 1
        return call(*args, **(kwargs or {}))


def calls_of_a_step(name: str) -> tuple[int, int, int]:
    """-> aten calls of engine.step(), how many of them read a number on the host, and DeepSpeed's own waits for the
    device in a whole step of two micro-steps."""
    from deepspeed.accelerator import get_accelerator

    engine, waits = build(name, accumulation=2), []
    get_accelerator().synchronize = lambda *_: waits.append(1)
    for _ in range(4):  # its timer begins after two steps
        waits.clear()
        for batch in micro_batches(1)[:2]:
            engine.backward(engine(*batch))
            with Calls() as calls:
                engine.step()
    return calls.counts.total(), calls.counts["_local_scalar_dense"], len(waits)


def test_a_step_in_bf16_reads_nothing_on_the_host():
    """By DeepSpeed's defaults it makes 333 calls, reads 6 numbers and waits 4 times."""
    ((calls, reads, waits),) = run_ranks(calls_of_a_step, 1, "zero1_bf16.json")
    assert calls < 250 and reads == 0 and waits == 0, (calls, reads, waits)


def moments_without_a_step() -> list[int]:
    """A checkpoint of a run whose every step was skipped."""
    import io

    from safetensors.torch import load

    from pretrain.parallel.moments import own_moments, write_moments

    sizes = []
    for name in ("zero3.json", "zero1_bf16.json"):
        engine, file = build(name), io.BytesIO()
        x_TD, y_T, images = micro_batches(1)[0]
        engine.backward(engine(x_TD * float("inf"), y_T, images))
        engine.step()
        write_moments(own_moments(engine, None), file)
        sizes.append(sum(float(value.abs().sum()) for value in load(file.getvalue()).values()))
    return sizes


def test_moments_of_a_run_that_skipped_every_step_are_zero():
    assert run_ranks(moments_without_a_step, 1) == [[0.0, 0.0]]
