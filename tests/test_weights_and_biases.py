"""Weights & Biases: what metrics.jsonl has, in one run for all starts of a stage, and never a reason to end."""

from __future__ import annotations

import json
import random
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain import train
from pretrain.metrics import MetricsLog, read_metrics
from pretrain.weights_and_biases import NOTE, chosen_mode


class StandIn:
    """For the package, which need not be installed: it notes what it is asked, and fails where `fails` says."""

    def __init__(self, fails: str = ""):
        self.fails, self.runs, self.logged, self.finished = fails, [], [], 0
        self.Settings = dict

    def init(self, **options: Any) -> StandIn:
        self._ask("init")
        random.random()  # as a package may
        self.runs.append(options)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict) -> None:
        self._ask("log")
        self.logged.append(values)

    def finish(self) -> None:
        self._ask("finish")
        self.finished += 1

    def _ask(self, what: str) -> None:
        if self.fails == what:
            raise RuntimeError(f"no {what} today\nand more")


@pytest.fixture
def package(monkeypatch):
    def install(fails: str = "") -> StandIn:
        package: Any = StandIn(fails)
        package.__spec__ = SimpleNamespace(name="wandb")
        monkeypatch.setitem(sys.modules, "wandb", package)
        return package

    monkeypatch.setenv("IMGLISH_WANDB", "offline")
    return install


def write_steps(directory: Path, start: int, stop: int) -> None:
    with MetricsLog(directory, resume_step=start) as log:
        for step in range(start + 1, stop + 1):
            log.write(step, {"loss": 1 / step, "skipped_steps": step, "mfu": None})


def test_a_stage_that_is_started_again_goes_on_in_the_same_run(tmp_path, package):
    wandb, stage = package(), tmp_path / "base" / "vision"
    state = random.getstate()
    write_steps(stage, 0, 3)
    write_steps(stage, 2, 4)
    assert random.getstate() == state, "a checkpoint has it"
    first, second = wandb.runs
    assert first == second and first["id"] == json.loads((stage / NOTE).read_text())["id"]
    assert (first["mode"], first["resume"], first["name"], first["dir"]) == (
        *("offline", "allow", "base/vision"),
        str(stage),
    )
    written = [{name: value for name, value in line.items() if value is not None} for line in wandb.logged]
    lines = [{k: v for k, v in line.items() if v is not None} for line in read_metrics(stage / "metrics.jsonl")]
    assert written == [*lines[:3], *lines[2:]] and wandb.finished == 2  # step 3 was done twice
    write_steps(tmp_path / "base" / "fusion", 0, 1)
    assert wandb.runs[2]["id"] != first["id"]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_where_it_fails_one_log_line_says_so(tmp_path, package, caplog, fails):
    package(fails)
    write_steps(tmp_path, 0, 3)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    (said,) = [record.message for record in caplog.records]
    assert said == f"Weights & Biases cannot be written: no {fails} today; metrics.jsonl has all of it"


def test_nothing_is_asked_where_nobody_wants_it(tmp_path, package, monkeypatch):
    wandb = package()
    monkeypatch.delenv("IMGLISH_WANDB")
    write_steps(tmp_path, 0, 1)
    assert not wandb.runs and not (tmp_path / NOTE).exists() and chosen_mode() == ""


def test_a_wrong_mode_and_a_missing_package_are_one_sentence(monkeypatch, capfd):
    line = ["--recipe", "tiny", "--stage", "vision", "--ds", "zero1.json", "--run-dir", "nowhere"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("IMGLISH_WANDB", "Offline")
    assert train.main(line) == 2
    error = capfd.readouterr().err
    assert "IMGLISH_WANDB=Offline is wrong; use offline or online, or unset it" in error and error.count("\n") == 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("IMGLISH_WANDB", "online")
    with pytest.raises(ValueError, match="needs a package that is not installed; call pip install -c launch/env/const"):
        chosen_mode()


def history(path: Path) -> tuple[str, list[dict[str, float]]]:
    """The id of the run in an offline file of the package, and its lines. (7 bytes, then records: 4 bytes of checksum,
    2 of length, 1 of kind, and a message.)"""
    from wandb.proto import wandb_internal_pb2

    data, at, own, lines = path.read_bytes(), 7, "", []
    while at + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        assert kind == 1, "a whole record"
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data[at + 7 : at + 7 + length])
        at += 7 + length
        own = record.run.run_id or own
        items = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        lines += [{name: value for name, value in items.items() if name[0] != "_"}] if items else []
    return own, lines


def test_the_package_itself_writes_the_same_figures_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="an extra, which the suite's environment does without: pip install wandb")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("IMGLISH_WANDB", "offline")
    stage = tmp_path / "base" / "vision"
    write_steps(stage, 0, 3)
    write_steps(stage, 2, 4)
    files = sorted((stage / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    (one, before), (two, after) = map(history, files)
    lines = [{k: v for k, v in line.items() if v is not None} for line in read_metrics(stage / "metrics.jsonl")]
    assert one == two == json.loads((stage / NOTE).read_text())["id"]
    assert (before, after) == (lines[:3], lines[2:])
    board = EventAccumulator(str(stage / "tensorboard")).Reload()
    shown = {event.step: event.value for event in board.Scalars("loss")}
    assert shown == pytest.approx({line["step"]: line["loss"] for line in lines}, rel=1e-6)
