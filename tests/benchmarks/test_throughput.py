"""benchmarks.throughput builds the run of pretrain.train, whatever the stage asks for, and counts each token once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import throughput
from benchmarks.throughput import main
from pretrain.batch import Layout
from pretrain.layers import PLAIN
from pretrain.recipes import load_recipe
from tests.distributed import run_ranks
from tests.small_run import RECIPE
from tests.step_batches import CONFIGS
from tests.toys import refused

# A step of small_run's fusion stage.
STEP = Layout(images=4, pairs=4, texts=4, patches=16, pair_len=8, text_len=10)
ROOM = "model.vocab_size=128"  # for the benchmark's own words


def measure(recipe: Path, ds: str, settings: list[str], *more: str) -> tuple[dict[str, Any], int]:
    """The benchmark's result on this rank, and how often blocks were compiled. `more`: arguments."""
    from benchmarks import throughput
    from pretrain.models.multiway.encoder import MultiwayEncoder
    from pretrain.run import image_targets

    throughput.SHARDS, throughput.SAMPLES, throughput.SIDE = 2, 16, 32
    compiled: list[Any] = []
    real: Callable[..., None] = MultiwayEncoder.compile_blocks
    # All of torch.compile but its last and slow part, the C++ compiler.
    MultiwayEncoder.compile_blocks = lambda self: compiled.append(real(self, backend="aot_eager"))  # type: ignore
    line = ["--recipe", str(recipe), "--stage", "fusion", "--ds", str(CONFIGS / ds), "--steps", "2", "--warmup", "1"]
    settings = [ROOM, *settings]
    if "--stored-codes" in more:
        image_targets.load_visual_tokenizer = image_targets.picture_codes = None  # type: ignore  # none in a step
    args = throughput.parse_args([*line, *more, *(word for setting in settings for word in ("--set", setting))])
    return throughput.measure(args), len(compiled)


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize("settings", [["compile=true"], ["optim.layer_decay=0.5"]], ids=str)
def test_one_process_counts_every_token_once(recipe, settings):
    ((result, compiled),) = run_ranks(measure, 1, recipe, "zero1.json", settings)
    check(result, recipe, ranks=1, data_ranks=1)
    assert compiled == ("compile=true" in settings)


def test_stored_codes_leave_the_tokenizer_out_of_the_steps(recipe):
    """It runs before them, in pretrain.encode_images; and the plan does not count it as a part of the step's memory."""
    more = ("--stored-codes", "--samples", "2", "--without", "vocabulary", "overflow", "fusing")
    ((result, _),) = run_ranks(measure, 1, recipe, "zero1.json", [], *more)
    check(result, recipe, ranks=1, data_ranks=1)
    ((online, _),) = run_ranks(measure, 1, recipe, "zero1.json", [], "--samples", "2")
    assert 0 < result["planned_memory_gib"] < online["planned_memory_gib"]


def test_what_is_wrong_is_one_sentence(recipe, capsys):
    line = ["--recipe", str(recipe), "--stage", "language", "--stored-codes"]
    assert "--stored-codes: --stage language predicts no codes" in refused(capsys, main, *line)
    assert "--samples=0 is below 1" in refused(capsys, main, "--samples", 0)


def test_a_full_gpu_is_one_sentence(monkeypatch, capsys):
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.81 GiB. GPU 0 has no more.")

    monkeypatch.setattr(throughput, "run", full)
    monkeypatch.setenv("DATA", "")  # which the benchmark sets
    line = ["--recipe", "tiny", "--stage", "fusion", "--ds", str(CONFIGS / "zero1.json"), "--samples", "2"]
    assert main(line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the GPU's memory is full (CUDA out of memory. Tried to allocate 7.81 GiB)")


@pytest.mark.parametrize(
    ("settings", "data_ranks"), [([], 2), (["parallel.pipe=2"], 1), (["parallel.tensor=2"], 1)], ids=str
)
def test_two_ranks(recipe, settings, data_ranks):
    for result, _ in run_ranks(measure, 2, recipe, "zero1.json", settings):
        check(result, recipe, ranks=2, data_ranks=data_ranks)


def check(result: dict[str, Any], recipe: Path, *, ranks: int, data_ranks: int) -> None:
    """Ranks of one copy of the model share its tokens, its FLOPs and its parameters."""
    whole, stage = load_recipe(str(recipe), "fusion", [ROOM])
    assert (result["ranks"], result["data_ranks"], result["steps"]) == (ranks, data_ranks, 2)
    seconds = result["ms_per_step"]["median"] / 1e3
    assert result["ms_per_step"]["min"] <= result["ms_per_step"]["median"] <= result["ms_per_step"]["max"]
    assert 0 <= result["data_wait"] < 1
    assert result["samples_per_s"] * seconds == pytest.approx(STEP.sequences)
    assert result["tokens_per_s"] * seconds == pytest.approx(STEP.rows)
    # About: how many rows are hidden is rounded for each micro-batch.
    flops = stage.task.flops(whole.model, stage, STEP)
    assert result["tflops_per_rank"] * 1e12 * seconds * ranks == pytest.approx(flops, rel=0.02)
    task = stage.task.build(whole.model, stage, PLAIN, None)
    executed = stage.task.executed_flops(whole.model, stage, STEP, frozenset(dict(task.named_parameters())))
    # These texts fill their rows, so that there is no padding to leave out.
    assert result["real_tflops_per_rank"] == pytest.approx(result["tflops_per_rank"])
    assert result["executed_tflops_per_rank"] * 1e12 * seconds * ranks == pytest.approx(executed, rel=0.02)
    assert executed < 0.95 * flops
    assert 0 < result["real_tokens_per_s"] <= result["tokens_per_s"]
    assert result["parameters"] == sum(value.numel() for value in task.parameters())
