"""Evaluations during training: they change nothing, name the best checkpoint, and end a stage early, killed or not."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pretrain.checkpoint.directory import best_step
from pretrain.checkpoint.weights import read_weights
from pretrain.config import Stage
from pretrain.lives import read_lives
from pretrain.metrics import EVALS, read_metrics
from pretrain.run.progress import Progress
from tests.run.test_identity import COMMON, MASKED
from tests.small_run import Ranks, check_weights, command, tokenizer_of
from tests.test_kill_and_resume import numbers, saves


def figures(run: Path) -> list[dict]:
    """evals.jsonl without what a clock measured."""
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(run / EVALS)]


@pytest.mark.parametrize(
    ("best", "values", "step"),
    [
        ("a", {1: 1.0, 2: 3.0, 3: 2.0}, 2),
        ("-a", {1: 1.0, 2: 3.0, 3: 0.5}, 3),
        ("a", {1: 3.0, 2: 3.0}, 1),
        ("a", {1: None, 2: -5.0, 3: float("nan")}, 2),
        ("a", {1: None}, None),
        ("b", {1: 1.0}, None),
        ("", {1: 1.0}, None),
    ],
)
def test_the_best_step(best, values, step):
    assert best_step({number: {"a": value} for number, value in values.items()}, best) == step


def progress(directory: Path, done: int, **stage) -> Progress:
    of_stage = {"evals_every": 2, "best": "a", "patience": 2, **stage}
    return Progress(SimpleNamespace(stage=SimpleNamespace(**of_stage), done=done), directory, directory)


def test_decisions_follow_from_the_lines_up_to_the_checkpoint(tmp_path):
    lines = [{"step": step, "seconds": 1.0, "a": a} for step, a in ((2, 1.0), (4, 5.0), (6, 4.0), (8, 3.0), (10, 9.0))]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    for done, best, ended in ((10, 10, False), (9, 4, True), (6, 4, False), (3, 2, False), (1, None, False)):
        (tmp_path / EVALS).write_text(whole + '{"step": 12, "a"')
        now = progress(tmp_path, done)
        assert (now.best, now.ended) == (best, ended), done
        assert (tmp_path / EVALS).read_text() == "".join(whole.splitlines(keepends=True)[: done // 2])
    assert not progress(tmp_path, 9, patience=0).ended
    now = progress(tmp_path, 10)
    assert [step for step in range(14) if now.due(step)] == [2, 4, 6, 8, 10, 12], "lines beyond a checkpoint are gone"
    assert not any(progress(tmp_path, 0, evals_every=0).due(step) for step in range(9))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"evals_every": -1}, "evals_every=-1 is below 0"),
        ({"evals_every": 5}, "evals_every=5 but the stage has no evals"),
        ({"best": "x"}, "best=x needs evaluations during training"),
        ({"patience": 3}, "patience=3 needs a figure"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Stage(**COMMON, objectives=(MASKED,), experts=("vision",), visual_tokenizer="tokenizer", **settings)


def signal_after(step: int, number: int, rank: int) -> None:
    """The process gets a signal in its step `step`."""
    from pretrain.run.build import Run

    take = Run.step

    def struck(self, *args, **kwargs):
        report = take(self, *args, **kwargs)
        if self.engine.global_steps == step:
            os.kill(os.getpid(), number)
        return report

    Run.step = struck


def die_at_the_end(rank: int) -> None:
    from pretrain import train

    train.hand_over = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_ranks_that_share_the_model_say_what_one_process_says(data, tmp_path):
    """Whole weights of tensor ranks under ZeRO-3, and of a pipeline, go into the model that is evaluated."""
    log, last = tmp_path / "log", {}
    settings = [tokenizer_of(data), "steps=2", "save_every=100", "drop_path=0.0", "evals_every=2"]
    layouts = {"one": (1, "zero1.json", []), "pipe": (2, "zero1.json", ["parallel.pipe=2"])}
    layouts |= {"tensor": (2, "zero3.json", ["parallel.tensor=2"])}
    for name, (ranks, ds, more) in layouts.items():
        started = Ranks(command(data, tmp_path / name, "fusion", *settings, *more, ds=ds), data, ranks, log)
        assert started.wait(120) == [0] * ranks, log.read_text()
        (last[name],) = figures(tmp_path / name / "fusion")
    assert last["one"]["masked/image/accuracy"] > 0 and last["pipe"] == last["one"] == last["tensor"]


@pytest.mark.slow
def test_a_stage_ends_early_with_its_best_weights_whatever_meets_it(data, tmp_path):
    log, alone, struck = tmp_path / "log", tmp_path / "alone", tmp_path / "struck"
    best = "best=masked/pair_text/accuracy"
    settings = [tokenizer_of(data), "steps=60", "save_every=100", "keep=1", "evals_every=2", "patience=2"]

    def start(run: Path, *more: str, prepare=None) -> list[int | None]:
        log.unlink(missing_ok=True)
        return Ranks(command(data, run, "fusion", *settings, *more, ds="zero1.json"), data, 1, log, prepare).wait(120)

    assert start(alone, best) == [0], log.read_text()
    history = {line["step"]: line for line in figures(alone / "fusion")}
    chosen, last = best_step(history, best.removeprefix("best=")), max(history)
    assert last == chosen + 4 < 60 and f"finished at step {last} of 60, early" in log.read_text()
    assert saves(alone) == {f"step_{step:08d}" for step in (chosen, last)}, "the best one stays beside the newest"
    whole = read_weights(alone / "fusion" / "weights.safetensors")[0]
    torch.testing.assert_close(
        whole, read_weights(alone / "fusion" / "checkpoints" / f"step_{chosen:08d}")[0], rtol=0, atol=0
    )
    assert read_lives(alone / "fusion")[-1].reason.startswith("ended early, as no later evaluation than that after")

    assert start(struck, "best=masked/pear_text/accuracy") == [2]
    assert "the evals give no such figure; did you mean masked/pair_text/accuracy?" in log.read_text()
    assert saves(struck) == {"step_00000002"}, "nothing is lost by it"
    assert start(struck, best, prepare=partial(signal_after, 4, signal.SIGUSR1)) == [75], log.read_text()
    assert [line["step"] for line in figures(struck / "fusion")] == [2], "a signal comes before an evaluation"
    assert start(struck, best, prepare=die_at_the_end) == [-signal.SIGKILL]
    assert start(struck, best) == [0], log.read_text()
    assert figures(struck / "fusion") == figures(alone / "fusion")
    assert numbers(struck / "fusion") == numbers(alone / "fusion")
    check_weights(struck / "fusion", alone / "fusion")
