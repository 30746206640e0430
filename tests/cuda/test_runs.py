"""Whole runs on one GPU, as a user starts them: against the CPU, resumed, with one GPU visible, and out of memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.metrics import read_metrics
from tests.small_run import ROOT, command, environment, tokenizer_of, train_stage

pytestmark = [pytest.mark.cuda, pytest.mark.timeout(240)]
ON_GPU, ON_CPU = {"DS_ACCELERATOR": "cuda"}, {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
# Words alone: the targets of pictures are codes, which a GPU computes in bf16.
WORDS = ("objectives.0.image_ratio=0", "objectives.0.pair_image_ratio=0")
STEPS = 6


def run(data: Path, place: Path, ds: str, *settings: str, **env: str) -> tuple[list[dict[str, Any]], str]:
    """The metrics of a run in `place`, and what it said. Blocks are not compiled, which takes a minute."""
    settings = ("compile=false", f"steps={STEPS}", f"keep={STEPS}", tokenizer_of(data), *settings)
    done = train_stage(data, place, "fusion", *settings, ds=ds, launched=True, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(place / "fusion" / "metrics.jsonl"), done.stderr


def assert_near(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], near: float) -> None:
    assert [line["step"] for line in ours] == [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=near), (a["step"], name)


@pytest.mark.parametrize("ds", [f"zero{stage}.json" for stage in range(4)])
def test_zero_on_a_gpu_gives_the_losses_of_the_cpu(data, tmp_path, ds):
    """In fp32, which torch does not shorten to TF32 by itself."""
    there, _ = run(data, tmp_path / "gpu", ds, *WORDS, **ON_GPU)
    here, _ = run(data, tmp_path / "cpu", ds, *WORDS, **ON_CPU)
    assert_near(there, here, 1e-3)
    samples = [(tmp_path / place / "fusion" / "samples.rank00000.jsonl").read_text() for place in ("gpu", "cpu")]
    assert samples[0] == samples[1]


@pytest.mark.parametrize(
    ("ds", "near", "settings"),
    [
        ("zero1.json", 1e-4, ()),
        ("zero1_bf16.json", 1e-2, ()),
        ("zero3_bf16.json", 1e-2, ()),
        ("zero1_bf16.json", 0, ("deterministic=true",)),
    ],
)
def test_a_resumed_run_goes_on_as_one_that_was_not_stopped(data, tmp_path, ds, near, settings):
    """To rounding: the order of sums in a GPU's backward pass is not always the same; with `deterministic` to the
    bit."""
    whole, _ = run(data, tmp_path, ds, *settings, **ON_GPU)
    stage = tmp_path / "fusion"
    for step in range(STEPS // 2 + 1, STEPS + 1):
        shutil.rmtree(stage / "checkpoints" / f"step_{step:08d}")
    (stage / "weights.safetensors").unlink()
    again, said = run(data, tmp_path, ds, *settings, **ON_GPU)
    assert f"step_{STEPS // 2:08d}" in said
    assert_near(again, whole, near)


def test_a_rank_that_sees_one_gpu_of_a_node_takes_it(data, tmp_path):
    """As SLURM's --gpus-per-task=1 shows it: LOCAL_RANK counts the node's ranks, and the GPU has the number 0."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    run(data, tmp_path, "zero1_bf16.json", LOCAL_RANK="3", CUDA_VISIBLE_DEVICES=first, **ON_GPU)


def test_a_full_gpu_is_one_sentence(data, tmp_path):
    line = command(data, tmp_path, "fusion", "compile=false", tokenizer_of(data), ds="zero1_bf16.json")
    code = "import sys, torch; torch.cuda.set_per_process_memory_fraction(1e-5); from pretrain import train; "
    words = line[line.index("pretrain.train") + 1 :]
    done = subprocess.run(
        [sys.executable, "-c", f"{code}sys.exit(train.main(sys.argv[1:]))", *words],
        env=environment(data) | ON_GPU,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "the GPU's memory is full" in done.stderr and "batch.accumulation=1" in done.stderr
