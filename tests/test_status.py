"""pretrain.status: what one look shows of stages that run, were killed, are finished, or hold nonsense."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from pretrain.checkpoint.directory import Retention
from pretrain.checkpoint.saver import Saver
from pretrain.lives import KILLED, LIVES, ThisLife, read_lives
from pretrain.lock import Lock
from pretrain.parallel.faults import Watch
from pretrain.report.page import page
from pretrain.report.rows import load_run
from pretrain.restarts import RESTARTS
from pretrain.status import main, status_of
from tests.checkpoint.stand_in import StandIn, install
from tests.toys import refused


def write_stage(directory: Path, steps: int, done: int, rate: float = 8.0) -> Path:
    """A stage of 4 samples a step; `rate` in samples/s."""
    directory.mkdir(parents=True)
    (directory / "recipe.json").write_text(json.dumps({"name": "r", "stages": {directory.name: {"steps": steps}}}))
    line = {"loss": 2.5, "samples_per_s": rate, "data_wait": 0.25, "mfu": None}
    lines = [{"step": step, "samples_seen": 4 * step, **line} for step in range(1, done + 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def note(directory: Path, *events: dict) -> None:
    place = {"start": 0, "repeated": 0, "ranks": 2, "host": "node7", "job": "41"}
    lines = [json.dumps((place if event["event"] == "begun" else {}) | event) for event in events]
    (directory / LIVES).write_text("\n".join(lines) + "\n")


def test_a_running_stage_shows_what_is_to_go(tmp_path, capsys):
    stage = write_stage(tmp_path / "vision", steps=100, done=40)
    now = time.time()
    note(stage, {"event": "begun", "time": now - 40})
    with Lock(stage):
        (status,) = (status_of(stage, now) for stage in load_run(tmp_path))
        assert main([str(tmp_path)]) == 0
    assert (status.state, status.step, status.steps, status.eta_s) == ("running", 40, 100, 60 * 4 / 8.0)
    assert status.effective == pytest.approx(40 * 4 / 8.0 / 40) and status.reasons == ()
    shown = capsys.readouterr().out
    assert "vision       running, step 40 of 100 (40 %)\n" in shown and "30 s to go, 8.0 samples/s, waits for" in shown
    assert status_of(load_run(tmp_path)[0], now).state == "not running"  # the lock was given back


def test_a_wait_for_data_is_shown_with_its_main_cause(tmp_path, capsys):
    stage = write_stage(tmp_path / "vision", steps=10, done=1)
    shown = {}
    for causes in ({}, {"read": 0.05, "decode": 0.15, "transfer": 0.05}):
        more = {f"data_wait/{cause}": share for cause, share in causes.items()}
        (stage / "metrics.jsonl").write_text(json.dumps({"step": 1, "data_wait": 0.25} | more) + "\n")
        assert main([str(tmp_path)]) == 0
        shown[len(causes)] = capsys.readouterr().out
    assert "waits for data 25%\n" in shown[0] and "waits for data 25% (decode)\n" in shown[3]


def test_a_lock_without_a_heartbeat_is_of_a_run_that_is_gone(tmp_path):
    stage = write_stage(tmp_path / "vision", steps=100, done=40)
    (stage / "lock").write_text("process 7 on node7 since 2026-01-01, beat 3\n")
    os.utime(stage / "lock", (time.time() - 3600,) * 2)
    (status,) = (status_of(stage, time.time()) for stage in load_run(tmp_path))
    assert (status.state, status.eta_s) == ("not running", None)


def test_lives_are_counted_with_the_reasons_of_their_ends(tmp_path, capsys):
    stage = write_stage(tmp_path / "vision", steps=10, done=10)
    (stage / "weights.safetensors").touch()
    note(
        stage,
        {"event": "begun", "time": 100.0},
        {"event": "begun", "time": 104.0, "start": 4, "repeated": 2},
        {"event": "ended", "time": 107.0, "reason": "OSError: no space\x1b[31m"},
        {"event": "begun", "time": 108.0, "start": 8, "repeated": 1},
        {"event": "ended", "time": 110.0, "reason": "finished"},
    )
    assert main([str(tmp_path), "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert (status["state"], status["lives"], status["repeated_steps"]) == ("finished", 3, 3)
    assert status["effective"] == pytest.approx(0.5)  # 10 steps of half a second in 10 s
    assert status["reasons"] == [KILLED, "OSError: no space\x1b[31m", "finished"]
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "3 lives, 3 steps done again, effective training time 50.0%" in shown and "\x1b" not in shown


def test_the_checkpoints_that_stay_are_named_with_their_reason(tmp_path, monkeypatch, capsys):
    install(monkeypatch.setattr)
    stage = write_stage(tmp_path / "vision", steps=100, done=40)
    recipe = {"keep_every": 20, "stages": {"vision": {"steps": 100, "best": "-x/loss"}}}
    (stage / "recipe.json").write_text(json.dumps(recipe))
    values = {10: 0.5, 20: 0.25, 30: None, 40: 0.75}
    (stage / "evals.jsonl").write_text("".join(json.dumps({"step": s, "x/loss": v}) + "\n" for s, v in values.items()))
    with Saver(StandIn(), stage / "checkpoints", Watch(), background=False) as saver:
        for step in (10, 20, 39, 40):
            saver.save(step, {}, Retention(9))
    (status,) = (status_of(stage, time.time()) for stage in load_run(tmp_path))
    assert status.checkpoints == ("40 for good", "39", "20 best x/loss (0.25), for good", "10")
    assert status.saved_step == 40
    assert main([str(tmp_path)]) == 0
    assert "checkpoints of step 40 for good; 39; 20 best x/loss (0.25), for good; 10\n" in capsys.readouterr().out


def test_restarts_are_shown_with_their_reasons(tmp_path, capsys):
    stage = write_stage(tmp_path / "vision", steps=100, done=40)
    lines = [
        {"action": action, "reached": step, "first": f"rank00001.log: rank 1 on node2 died \x1b[1m at {step}"}
        for step, action in enumerate(["again", "again", "requeue", "again", "end"], 1)
    ]
    told = [json.dumps({"time": 1.0, "job": "7", "code": 69, "node": "node2"} | line) for line in lines]
    (stage / RESTARTS).write_text("\n".join([*told, "{"]))
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "started again 3 times in place, once by the queue" in shown and "\x1b" not in shown
    assert "(the last 3 of 5 failures; all by --json)" in shown and "in place at step 2:" not in shown
    assert "started again by the queue at step 3: rank00001.log: rank 1 on node2 died" in shown
    assert "the job ended at step 5: rank00001.log" in shown
    assert main([str(tmp_path), "--json"]) == 0
    (status,) = json.loads(capsys.readouterr().out)
    assert len(status["restarts"]) == 5 and status["restarts"][0].startswith("started again in place at step 1: rank0")
    report = page(tmp_path, load_run(tmp_path))
    assert "3 times in place, once by the queue" in report and "started again by the queue at step 3: rank" in report


def test_a_life_writes_how_it_begins_and_ends(tmp_path):
    with pytest.raises(ValueError, match="bad"), ThisLife(tmp_path, 4, 7):
        raise ValueError("bad\nworse")
    with ThisLife(tmp_path, 8, 8) as life:
        life.reason = "stopped"
    ThisLife(tmp_path, 9, 9)
    first, second, third = read_lives(tmp_path)
    assert (first.start, first.repeated, first.ranks, first.reason) == (4, 3, 1, "ValueError: bad")
    assert (second.repeated, second.reason) == (0, "stopped")
    assert third.ended is None and third.begun >= (second.ended or 0) >= second.begun


@pytest.mark.parametrize("line", ["", "{", "[]", "7", '{"event": "begun"}', "[" * 10_000, '{"event": "ended"}', "\0"])
def test_damaged_lines_are_left_out(tmp_path, line):
    good = {"event": "begun", "time": 1, "start": 0, "repeated": 0, "ranks": 1, "host": "", "job": ""}
    (tmp_path / LIVES).write_text(f"{json.dumps(good)}\n{line}\n")
    assert len(read_lives(tmp_path)) == 1


def test_a_directory_without_stages_is_one_sentence(tmp_path, capsys):
    assert "holds no stage" in refused(capsys, main, tmp_path)
    assert "is not a directory" in refused(capsys, main, tmp_path / "nowhere")
