"""One run that changes its layout each time it is killed: the same samples, the same losses to rounding, one result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.metrics import read_metrics
from tests.small_run import Ranks, check_weights, command, evaluate, tokenizer_of, train_stage
from tests.toys import wait_for

# (ranks, DeepSpeed JSON, settings) of each leg; all but the last are killed after two more checkpoints.
LEGS = [
    (2, "zero3.json", ["parallel.tensor=2"]),
    (2, "zero1.json", ["activation_checkpointing=1"]),
    (4, "zero1.json", ["parallel.tensor=2", "parallel.pipe=2"]),
    (1, "zero0.json", []),
    (4, "zero2.json", ["parallel.tensor=2"]),
    (4, "zero3.json", ["parallel.sequence=2"]),
    (2, "zero1.json", ["parallel.pipe=2"]),
]
SETTINGS = ["save_every=2", "steps=14", "keep=100"]


def settings(data: Path) -> list[str]:
    return [*SETTINGS, tokenizer_of(data)]


def keys(run: Path) -> dict[int, list[str]]:
    """What was consumed at each step, by all ranks."""
    found: dict[int, list[str]] = {}
    for path in run.glob("samples.rank*.jsonl"):
        for line in map(json.loads, path.open()):
            found.setdefault(line["step"], []).extend(line["keys"])
    return {step: sorted(some) for step, some in found.items()}


@pytest.mark.slow
def test_a_run_goes_on_under_any_other_layout(data, tmp_path):
    alone, changing, log = tmp_path / "alone", tmp_path / "changing", tmp_path / "log"
    done = train_stage(data, alone, "fusion", *settings(data))
    assert done.returncode == 0, done.stderr
    for leg, (ranks, ds, more) in enumerate(LEGS):
        started = Ranks(command(data, changing, "fusion", *settings(data), *more, ds=ds), data, ranks, log)
        if leg < len(LEGS) - 1:
            checkpoint = changing / "fusion" / "checkpoints" / f"step_{2 * (leg + 1):08d}"
            wait_for(lambda here=checkpoint, ranks=started: here.is_dir() or any(ranks.wait(0.02)), 120)
            assert checkpoint.is_dir(), log.read_text()
            started.kill()
        else:
            assert started.wait(120) == [0] * ranks, log.read_text()
    told = log.read_text()
    assert "saved on 2 ranks (zero 3, tensor 2), on 2 ranks (zero 1): same samples" in told
    assert "on 4 ranks (zero 1, tensor 2, pipe 2)" in told and "on 1 ranks (zero 0)" in told
    assert keys(changing / "fusion") == keys(alone / "fusion")
    got, want = (read_metrics(run / "fusion" / "metrics.jsonl") for run in (changing, alone))
    assert [line["step"] for line in got] == list(range(1, 15))
    for a, b in zip(got, want, strict=True):
        for name in ("loss", "loss/image", "loss/pair_text", "lr"):
            assert a[name] == pytest.approx(b[name], abs=2e-6), (a["step"], name)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-5), a["step"]
    check_weights(changing / "fusion", alone / "fusion", 5e-6)


@pytest.mark.slow
def test_weights_go_from_family_to_family_and_to_one_cpu(data, tmp_path):
    plan = {
        "vision": (4, "zero3.json", ["parallel.tensor=2"]),
        "language": (4, "zero1.json", ["parallel.tensor=2", "parallel.pipe=2"]),
    }
    evaluated = {}
    for name, legs in (("split", plan), ("single", dict.fromkeys(plan, (1, "zero0.json", [])))):
        run, log = tmp_path / name, tmp_path / f"{name}.log"
        for stage, (ranks, ds, more) in legs.items():
            wanted = settings(data)[-1:] if stage == "vision" else []
            started = Ranks(command(data, run, stage, *wanted, *more, "steps=6", ds=ds), data, ranks, log)
            assert started.wait(120) == [0] * ranks, log.read_text()
        done = evaluate(data, run, "vision")
        assert done.returncode == 0, done.stderr
        evaluated[name] = json.loads((run / "vision" / "eval.json").read_text())
    for stage in plan:
        check_weights(tmp_path / "split" / stage, tmp_path / "single" / stage, 5e-6)
    assert evaluated["split"]["masked/image/accuracy"] == evaluated["single"]["masked/image/accuracy"]
