"""Whole runs on two ranks: of one the losses are not finite in some steps, or the memory is full."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from pretrain.checkpoint.weights import read_weights
from pretrain.optim import Optim, learning_rate
from tests.small_run import Ranks, command

# The losses between two lines of metrics.jsonl count too.
SETTINGS = ("init_from=null", "steps=6", "log_every=6", "save_every=2")


def spoil(bad: tuple[int, ...], rank: int) -> None:
    from pretrain.objectives.masked import MaskedDataHeads

    forward, step = MaskedDataHeads.forward, iter(range(1, 100))

    def spoilt(self, *args):
        factor = float("nan") if next(step) in bad and rank == 1 else 1.0
        return {name: value * factor for name, value in forward(self, *args).items()}

    MaskedDataHeads.forward = spoilt


def run(data: Path, place: Path, bad: tuple[int, ...], ds: str, *settings: str) -> tuple[list, str, list[str]]:
    """-> exit codes, what rank 0 and 1 said, and the checkpoints."""
    ranks = Ranks(
        command(data, place, "language", *SETTINGS, *settings, ds=ds), data, 2, place / "log", partial(spoil, bad)
    )
    codes = ranks.wait(90)
    ranks.kill()
    return codes, (place / "log").read_text(), sorted(p.name[-1] for p in place.glob("language/checkpoints/step_*"))


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["zero1_bf16.json", "zero3_bf16.json", "zero0.json"])
def test_it_ends_at_the_first_bad_step_and_nothing_is_saved_after_it(data, tmp_path, ds):
    codes, said, checkpoints = run(data, tmp_path, (3,), ds)
    assert codes == [2, 2] and checkpoints == ["2"], said
    (line,) = (line for line in said.splitlines() if "error: " in line)
    assert "step 3: the gradient norm is" in line and "(loss=nan, loss/text=nan)" in line and "diverged" in line
    assert str(tmp_path / "language/checkpoints") in line


@pytest.mark.slow
def test_a_recipe_may_allow_some_bad_steps_in_a_row(data, tmp_path):
    codes, said, checkpoints = run(data, tmp_path, (1, 4), "zero1_bf16.json", "max_skipped_steps=1")
    assert codes == [0, 0] and checkpoints == ["2", "6"], said
    assert "step 4 is skipped" in said and "(1 of 1 in a row)" in said
    (line,) = map(json.loads, (tmp_path / "language/metrics.jsonl").read_text().splitlines())
    assert line["skipped_steps"] == 2
    assert line["lr"] == learning_rate(Optim(lr=1e-3, warmup_steps=2), 6, 6)
    read_weights(tmp_path / "language")  # refuses what is not finite


@pytest.mark.slow
def test_one_bad_step_more_than_allowed_ends_it(data, tmp_path):
    codes, said, checkpoints = run(data, tmp_path, (3, 4), "zero1_bf16.json", "max_skipped_steps=1")
    assert codes == [2, 2] and checkpoints == ["2"], said
    assert "step 4: the gradient norm is inf" in said and "2 steps in a row with max_skipped_steps=1" in said


def fill_memory(full: tuple[int, ...], rank: int) -> None:
    import torch

    from pretrain.objectives.masked import MaskedDataHeads

    forward = MaskedDataHeads.forward

    def too_large(self, *args):
        if rank in full:
            said = "CUDA out of memory. Tried to allocate 7.81 GiB. GPU 0 has a capacity of 79.10 GiB."
            raise torch.cuda.OutOfMemoryError(said)
        return forward(self, *args)

    MaskedDataHeads.forward = too_large


@pytest.mark.slow
@pytest.mark.parametrize("full", [(0, 1), (1,)], ids=str)
def test_a_gpu_that_is_full_is_one_sentence_on_every_rank_that_meets_it(data, tmp_path, full):
    line = command(data, tmp_path, "language", *SETTINGS, "batch.accumulation=2", ds="zero1_bf16.json")
    ranks = Ranks(line, data, 2, tmp_path / "log", partial(fill_memory, full))
    codes = ranks.wait(90)
    ranks.kill()
    said = (tmp_path / "log").read_text()
    assert codes == [2 if rank in full else 69 for rank in range(2)], said
    lines = [line for line in said.splitlines() if "memory is full" in line]
    assert len(lines) == len(full) and "Traceback" not in said, said
    for line in lines:
        assert "Tried to allocate 7.81 GiB" in line and "batch.accumulation=2" in line
        assert "activation_checkpointing=0" in line and "capacity" not in line
