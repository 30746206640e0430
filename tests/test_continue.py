"""--continue-from: more steps of a finished run equal, bit for bit, a run that was so long from the beginning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.metrics import MEASURED, read_metrics
from tests.small_run import Ranks, check_weights, command, evaluate, tokenizer_of

CONSTANT = ("optim.schedule=constant",)
WSD = ("optim.schedule=wsd", "optim.decay_steps=2")


def numbers(run: Path) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(run / "metrics.jsonl")]


def train(data: Path, run: Path, n: int, *settings: str, more: tuple[str, ...] = (), ds: str = "zero0.json") -> str:
    log = run.with_suffix(".log")
    ranks = Ranks([*command(data, run, "fusion", *settings, ds=ds), *more], data, n, log)
    assert ranks.wait(120) == [0] * n, log.read_text()
    return log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("n", "ds", "schedule"), [(1, "zero0.json", CONSTANT), (2, "zero1.json", WSD)])
def test_more_steps_equal_a_run_that_was_so_long_from_the_beginning(data, tmp_path, n, ds, schedule):
    base, whole, longer = tmp_path / "base", tmp_path / "whole", tmp_path / "longer"
    (base / "tokenizer").parent.mkdir()
    (base / "tokenizer").symlink_to(data / "start" / "tokenizer")  # the stage that the settings name lies there only
    train(data, base, n, "steps=3", *CONSTANT, ds=ds)
    train(data, whole, n, "steps=6", *schedule, tokenizer_of(data), ds=ds)
    before = {path: path.read_bytes() for path in sorted((base / "fusion").rglob("*")) if path.is_file()}
    more = ("--continue-from", str(base / "fusion"))
    said = train(data, longer, n, "steps=6", *schedule, more=more, ds=ds)
    assert f"resumed from {base / 'fusion' / 'checkpoints' / 'step_00000003'}" in said
    check_weights(longer / "fusion", whole / "fusion")
    assert numbers(longer / "fusion") == numbers(whole / "fusion") and len(numbers(longer / "fusion")) == 6
    assert {path: path.read_bytes() for path in before} == before, "the parent stays as it was"
    assert json.loads((longer / "fusion/recipe.json").read_text())["identity"]["continues"]["step"] == 3
    assert "finished before" in train(data, longer, n, "steps=6", *schedule, more=more, ds=ds)
    if n == 1:  # it finds the tokenizer where its parent does
        done = evaluate(data, longer, "fusion")
        assert done.returncode == 0 and (longer / "fusion" / "eval.json").is_file(), done.stderr
