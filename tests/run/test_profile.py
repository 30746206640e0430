"""Profiled steps: a trace of exactly these, the five dearest lines, and the same run as without."""

from __future__ import annotations

import gzip
import json
import logging
from types import SimpleNamespace

import pytest
import torch

from pretrain.config import profiled_steps
from pretrain.run import profile
from pretrain.run.profile import Profile, dearest
from tests.run.test_identity import RECIPE, VISION, noted, replace

WEIGHT = torch.ones(30, 30)


def steps(asked: str, directory, numbers, calls: list[int]) -> None:
    profiled = Profile(asked, directory)
    for number in numbers:
        with profiled.step(number):
            for _ in range(number):
                WEIGHT @ WEIGHT
            calls.append(number)
    profiled.close()


def products(path) -> int:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


@pytest.mark.parametrize(
    ("asked", "numbers", "name", "count"),
    [
        ("2:3", range(1, 6), "trace_2_3.json.gz", 2 + 3),
        ("2:9", range(1, 5), "trace_2_4.json.gz", 2 + 3 + 4),  # the run ends before
        ("2:3", range(3, 6), "trace_3_3.json.gz", 3),  # it was resumed in between
    ],
)
def test_the_trace_holds_the_steps_that_were_asked_for(asked, numbers, name, count, tmp_path, caplog):
    calls: list[int] = []
    with caplog.at_level(logging.INFO, "pretrain"):
        steps(asked, tmp_path, numbers, calls)
    assert calls == list(numbers)
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == name and products(path) == count
    lines = [record.message for record in caplog.records if " ms a step " in record.message]
    assert len(lines) <= profile.LINES and any("aten::mm" in line for line in lines)


@pytest.mark.parametrize(("asked", "numbers"), [("", range(1, 4)), ("2:3", range(4, 6))])
def test_nothing_is_written_where_nothing_is_profiled(asked, numbers, tmp_path):
    steps(asked, tmp_path, numbers, [])
    assert not list(tmp_path.iterdir())


def test_a_profile_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file in its way")
    calls: list[int] = []
    steps("1:1", tmp_path, range(1, 3), calls)
    assert calls == [1, 2] and "could not be written" in caplog.text


def test_the_dearest_lines_are_those_of_the_device():
    def event(key: str, cpu: float, device: float):
        return SimpleNamespace(key=key, count=4, self_cpu_time_total=cpu, self_device_time_total=device)

    many = [event(f"op{number}", 9e3 - number, 1e3 * number) for number in range(8)]
    first, *others = dearest(many, steps=2)
    assert "op7" in first and "25.0 %" in first and "3.50 ms a step" in first and "2 calls" in first
    assert len(others) == 4


@pytest.mark.parametrize("asked", ["10", "5:3", "0:3", "a:b", "10:", "-1:3", "1:2:3"])
def test_other_steps_are_refused(asked):
    with pytest.raises(ValueError, match="such as 10:15"):
        replace(RECIPE, profile_steps=asked)


def test_profiled_steps_are_no_part_of_what_a_run_is():
    assert profiled_steps("10:15") == (10, 15)
    assert replace(RECIPE, profile_steps="10:15").profile_steps == "10:15"
    from pretrain.run.identity import identity_of

    assert json.loads(json.dumps(identity_of(replace(RECIPE, profile_steps="10:15"), VISION))) == noted()
