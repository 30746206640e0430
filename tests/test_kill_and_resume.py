"""kill -9 at random moments, also during saves: what comes out is bit-equal to the run that was left alone."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.fault_runs.compare import Ending, compare
from pretrain.checkpoint.copies import LOCAL
from pretrain.lives import read_lives
from pretrain.metrics import MEASURED, read_metrics
from tests.small_run import Ranks, command, evaluate, tokenizer_of
from tests.toys import wait_for

STEPS = 24
KILLS = 5
EVALS_EVERY = 8  # the last one after the last step


def settings(data: Path) -> list[str]:
    return [f"steps={STEPS}", tokenizer_of(data), "loading.workers=1"]


def numbers(run: Path) -> list[dict]:
    """metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_metrics(run / "metrics.jsonl")]


def traces(run: Path) -> list[list[dict]]:
    return [[json.loads(line) for line in path.open()] for path in sorted(run.glob("samples.rank*.jsonl"))]


def saves(run: Path) -> set[str]:
    return {path.name for path in (run / "fusion" / "checkpoints").glob("step_*")}


def slow_disk(rank: int) -> None:
    """Most of the time something is being written behind the steps."""
    sync = os.fsync

    def slow(file) -> None:
        if threading.current_thread().name == "save":
            time.sleep(0.005)
        sync(file)

    os.fsync = slow


@pytest.mark.slow
@pytest.mark.parametrize("ds", ["zero1.json", "zero3.json"])
def test_a_killed_run_ends_bit_equal(data, tmp_path, ds):
    """It evaluates itself, and writes its checkpoints in the background; the run that was left alone does neither."""
    left_alone, killed = tmp_path / "alone", tmp_path / "killed"
    plain = command(data, left_alone, "fusion", *settings(data), "save_in_background=false", ds=ds)
    ranks = Ranks(plain, data, 2, tmp_path / "alone.log")
    assert ranks.wait(120) == [0, 0], (tmp_path / "alone.log").read_text()
    log = tmp_path / "killed.log"
    dice, done = random.Random(ds), 0
    line = command(data, killed, "fusion", *settings(data), f"evals_every={EVALS_EVERY}", ds=ds)
    for _ in range(KILLS):
        before = saves(killed)
        ranks = Ranks(line, data, 2, log, slow_disk)
        # Not before it gets somewhere (its start takes seconds); then at any moment of a step or a save.
        wait_for(lambda b=before, r=ranks: saves(killed) != b or r.wait(0.05) == [0, 0])
        time.sleep(dice.uniform(0, 0.25))
        finished = ranks.wait(0.01) == [0, 0]
        ranks.kill()
        if finished:
            break
        done += 1
    assert done >= 3, f"only {done} kills hit the run; its log: {log.read_text()}"
    ranks = Ranks(line, data, 2, log)
    assert ranks.wait(120) == [0, 0], log.read_text()
    assert "resumed from" in log.read_text()
    assert numbers(killed / "fusion") == numbers(left_alone / "fusion")
    assert len(numbers(killed / "fusion")) == STEPS
    assert traces(killed / "fusion") == traces(left_alone / "fusion")
    # Also the moments and the generators in the last checkpoint.
    assert compare(killed / "fusion", left_alone / "fusion") == Ending([], 0, 0, 0.0)
    during = read_metrics(killed / "fusion" / "evals.jsonl")
    assert [line["step"] for line in during] == [*range(EVALS_EVERY, STEPS + 1, EVALS_EVERY)]
    if ds == "zero1.json":
        assert evaluate(data, left_alone, "fusion").returncode == 0
        afterwards = json.loads((left_alone / "fusion" / "eval.json").read_text())
        last = {name: value for name, value in during[-1].items() if name not in ("step", "seconds")}
        assert last and last == {name: afterwards[name] for name in last}
    lives = read_lives(killed / "fusion")
    # A kill before the first step is no life; one at its very end may have let it finish.
    assert 3 <= len(lives) <= done + 1 and lives[-1].reason == "finished" and lives[0].reason == ""
    assert [life.reason for life in read_lives(left_alone / "fusion")] == ["finished"]


def on_node(place: Path, rank: int) -> None:
    """Each rank on a node of its own."""
    os.environ.update({LOCAL: str(place / f"node{rank}"), "SLURMD_NODENAME": f"node{rank}"})


def copied(place: Path) -> int:
    """The step of the newest copy that both nodes have whole; 0 for none."""
    names = [{path.name for path in node.glob("imglish-*/copies/*/*/step_*")} for node in place.glob("node*")]
    return max((int(name.removeprefix("step_")) for name in set.intersection(*names)), default=0) if names else 0


@pytest.mark.slow
def test_a_lost_node_costs_the_steps_since_the_last_copy(data, tmp_path):
    """Nothing is saved where both nodes see it before the end; what the run goes on from is the neighbour's."""
    log, prepare = tmp_path / "log", partial(on_node, tmp_path)
    line = command(data, tmp_path / "run", "fusion", *settings(data), "save_every=1000", ds="zero3.json")
    line += ["--set", "copy_every=1"]
    ranks = Ranks(line, data, 2, log, prepare)
    wait_for(lambda: copied(tmp_path) >= 8 or not all(process.is_alive() for process in ranks.processes))
    ranks.kill()
    shutil.rmtree(tmp_path / "node1")
    assert not saves(tmp_path / "run"), "the run came to its end"
    ranks = Ranks(line, data, 2, log, prepare)
    assert ranks.wait(120) == [0, 0], log.read_text()
    assert "brought back from the nodes' own copies, the files of node1 (from node0)" in log.read_text()
    first, second = read_lives(tmp_path / "run" / "fusion")
    assert first.start == 0 and second.start >= 8
    plain = command(data, tmp_path / "alone", "fusion", *settings(data), ds="zero3.json")
    assert Ranks(plain, data, 2, log).wait(120) == [0, 0], log.read_text()
    assert compare(tmp_path / "run" / "fusion", tmp_path / "alone" / "fusion") == Ending([], 0, 0, 0.0)
    assert not list(tmp_path.glob("node*/imglish-*/copies/*/*")), "a finished stage needs none"


@pytest.mark.slow
def test_a_signal_saves_at_the_next_step_and_exits_with_its_own_code(data, tmp_path):
    line = command(data, tmp_path, "fusion", *settings(data), "save_every=1000", "steps=4000", ds="zero1.json")
    log = tmp_path / "log"
    ranks = Ranks(line, data, 2, log, launched=True)
    wait_for((tmp_path / "fusion" / "metrics.jsonl").is_file)
    time.sleep(0.5)
    os.kill(ranks.processes[1].pid, signal.SIGUSR1)  # one rank is enough
    assert ranks.wait(30) == [75, 75], log.read_text()
    assert "stopped by a signal and saved at step" in log.read_text()
    assert len(saves(tmp_path)) == 1
    (life,) = read_lives(tmp_path / "fusion")
    assert (life.start, life.ranks, life.reason) == (0, 2, "stopped by a signal, after saving")


def note_syncs(place: Path, rank: int) -> None:
    sync = os.fsync

    def noting(file) -> None:
        sync(file)
        handle = file if isinstance(file, int) else file.fileno()
        with place.open("a") as notes:
            notes.write(os.readlink(f"/proc/self/fd/{handle}") + "\n")

    os.fsync = noting


@pytest.mark.slow
def test_metrics_and_trace_are_synced_before_each_save_and_a_hole_is_named(data, tmp_path):
    log, notes, run = tmp_path / "log", tmp_path / "syncs", tmp_path / "run" / "vision"
    line = command(data, run.parent, "vision", tokenizer_of(data), "steps=4", "save_every=2")
    assert Ranks(line, data, 1, log, partial(note_syncs, notes)).wait(60) == [0], log.read_text()
    synced = [Path(path).name for path in notes.read_text().splitlines()]
    saves = [place for place, name in enumerate(synced) if name.startswith(".MANIFEST.json.")]
    assert len(saves) == 2
    for first, last in zip([0, *saves], saves, strict=False):
        assert {"metrics.jsonl", "samples.rank00000.jsonl"} <= set(synced[first:last])

    # As if the node had been lost with what was not synced then.
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    (run / "weights.safetensors").unlink()
    for path in (run / "metrics.jsonl", run / "samples.rank00000.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    assert Ranks(line, data, 1, log).wait(60) == [0], log.read_text()
    said = log.read_text()
    assert said.count("metrics.jsonl has no line of the steps 2 to 2: lost with a node, or log_every was changed") == 1
    assert said.count("samples.rank00000.jsonl ends at step 1, not 2: lost with a node") == 1
