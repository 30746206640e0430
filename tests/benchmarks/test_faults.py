"""benchmarks.faults: its faults strike where they say, and what is not equal at the end of a run is seen."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import faults
from benchmarks.fault_runs.compare import compare, count_samples
from benchmarks.fault_runs.run import Ended, FaultyRun
from benchmarks.fault_runs.schedule import DAMAGES, Alone, Schedule, hurt
from benchmarks.fault_runs.strike import Strike, build, read_events
from tests.small_run import ROOT, environment
from tests.toys import refused

# Four events on the run: open, write, fsync, rename. What fails is said as its errno.
VICTIM = """
import os, sys
from pathlib import Path
from benchmarks.fault_runs.strike import Strike, arm
place = Path(sys.argv[1])
(place / "else").write_text("is no event")
arm(place / "run", place / "events", Strike(**eval(sys.argv[2])))
for attempt in range(int(sys.argv[3])):
    try:
        with open(place / "run.new", "wb", buffering=0) as file:
            data = memoryview(b"12345678")
            while data:
                data = data[file.write(data):]
            os.fsync(file.fileno())
        os.rename(place / "run.new", place / "run.txt")
    except OSError as error:
        print(error.errno)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return build(tmp_path_factory.mktemp("strike"))


def strike(library: Path, place: Path, strike: Strike, attempts: int = 1) -> tuple[int, list[int], str]:
    """The victim's code and the errnos that it met, and the call that was struck."""
    line = [sys.executable, "-c", VICTIM, str(place), repr(strike._asdict()), str(attempts)]
    done = subprocess.run(
        line, env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert not done.stderr, done.stderr
    return done.returncode, [int(word) for word in done.stdout.split()], read_events(place / "events")[1]


@pytest.mark.parametrize(
    ("event", "when", "new", "there"),
    [
        (1, "before", None, False),
        (2, "before", b"", False),
        (2, "amid", b"1234", False),
        (2, "after", b"12345678", False),
        (4, "before", b"12345678", False),
        (4, "after", None, True),
    ],
)
def test_a_kill_strikes_at_its_call(library, tmp_path, event, when, new, there):
    code, _, struck = strike(library, tmp_path, Strike(event, signal="SIGKILL", when=when))
    assert code == -signal.SIGKILL and struck == ["open .new", "write .new", "fsync .new", "rename .new"][event - 1]
    written = tmp_path / "run.new"
    assert (written.read_bytes() if written.exists() else None) == new and (tmp_path / "run.txt").exists() == there


@pytest.mark.parametrize(
    ("chosen", "attempts", "errors", "struck"),
    [
        (Strike(1, error="EIO"), 2, [5], "open .new"),
        (Strike(1, error="EIO", stays=True), 2, [5, 5], "open .new"),
        (Strike(1, "rename", error="ESTALE"), 2, [116], "rename .new"),
        (Strike(2, "write", error="ENOSPC"), 2, [28], "write .new"),
        (Strike(2, error="ENOSPC", when="amid"), 1, [28], "write .new"),  # the second half's
        (Strike(3, error="EROFS"), 1, [30], "rename .new"),  # a read-only disk can be synced
        (Strike(9, error="EIO"), 2, [], ""),
        (Strike(1, signal="SIGUSR2", when="later", delay_us=10**7), 1, [], "open .new"),
    ],
)
def test_an_error_strikes_at_its_call(library, tmp_path, chosen, attempts, errors, struck):
    assert strike(library, tmp_path, chosen, attempts) == (0, errors, struck)


def test_lost_and_repeated_samples_are_counted_step_by_step():
    want = {1: Counter("ab"), 2: Counter("cd")}
    assert count_samples({1: Counter("ab"), 2: Counter("cd")}, want) == (0, 0)
    assert count_samples({1: Counter("ab"), 2: Counter("cdd")}, want) == (0, 1)
    assert count_samples({1: Counter("ab")}, want) == (2, 0)
    assert count_samples({1: Counter("ac"), 2: Counter("bd"), 3: Counter("e")}, want) == (2, 3), "each at its step"


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_done(tmp_path, how):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"header" + bytes(2000))
    for seed in range(20):
        said = hurt(file, how, random.Random(seed))
        assert said.startswith(f"{how} weights.")
        assert (tmp_path / said.split()[1]).exists() == (how != "delete")
        assert how == "extra" or not file.exists() or file.read_bytes() != b"header" + bytes(2000)
        file.write_bytes(b"header" + bytes(2000))


def test_the_schedule_is_a_function_of_seed_and_run():
    alone = Alone(Path(), [[f"{n} write /fusion/samples.rank00000.jsonl" for n in range(200)]] * 2)
    runs = [Schedule(seed, run, lambda layout: alone) for seed, run in [(1, 3), (1, 3), (1, 4), (2, 3)]]
    first, again, *others = [[run.life() for _ in range(20)] for run in runs]
    assert first == again and first not in others
    assert {life.kind for life in first} == {"kill", "errno", "signal"}


@pytest.mark.parametrize(
    ("what", "said", "struck", "wrong"),
    [
        ("flip moments", "checkpoint rejected: {0}/moments is damaged", True, 0),
        ("flip moments", "nothing of it", False, 0),
        ("flip moments", "resumed from {0}", False, 1),
        ("extra moments", "resumed from {0}", True, 0),
        ("extra moments", "checkpoint rejected: {0}/moments is damaged", False, 0),
    ],
)
def test_damage_counts_when_a_life_met_it(tmp_path, what, said, struck, wrong):
    path = tmp_path / "step_00000002"
    run = FaultyRun(tmp_path, tmp_path, 0, Schedule(0, 0, lambda layout: Alone(Path(), [])))
    fault = run._note("damage", what, False, path.name)
    run._damaged = path, fault
    run._look_for_damage(Ended([0], said.format(path), [1], ""))
    assert (fault["struck"], len(run.wrong)) == (struck, wrong)


def test_finished_runs_of_another_seed_are_refused(tmp_path, capsys):
    (tmp_path / faults.FINISHED).write_text('{"seed": 3}\n{"se')
    assert "holds runs of --seed 3" in refused(capsys, faults.main, "--work", tmp_path, "--seed", "4")
    assert faults.read_finished(tmp_path / faults.FINISHED, 3) == [{"seed": 3}]
    assert (tmp_path / faults.FINISHED).read_text() == '{"seed": 3}\n'
    assert "--faults=0 is below 1" in refused(capsys, faults.main, "--faults", "0")


@pytest.mark.slow
def test_ten_faults_and_what_would_be_seen(data, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out.json"
    shutil.copytree(data, work / "data")
    line = [sys.executable, "-m", "benchmarks.faults", "--faults", "10", "--seed", "2", "--work", str(work)]
    done = subprocess.run(
        [*line, "--out", str(out)], env=environment(data), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert results["faults_struck"] >= 10 and results["runs_good"] == results["runs"]
    assert results["samples_lost"] == results["samples_repeated"] == results["tracebacks"] == 0

    (alone,) = (work / "alone").glob("*/fusion")
    stage = tmp_path / "stage"
    shutil.copytree(alone, stage)
    assert not compare(stage, alone).unequal
    for name, change in [("metrics.jsonl", '"loss": 3'), ("samples.rank00000.jsonl", '"keys": ["i')]:
        path = stage / name
        path.write_text(path.read_text().replace(change, f"{change[:-1]}9", 1))
    ending = compare(stage, alone)
    assert ending.unequal == ["metrics", "samples"] and (ending.lost, ending.repeated) == (1, 1) and ending.apart > 5
