"""Two jobs in one run directory, and run directories that are not one: refused before anything is written."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.small_run import Ranks, command, tokenizer_of
from tests.toys import wait_for


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_job_ends_with_one_sentence_and_the_first_goes_on(data, tmp_path, ranks):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = [tokenizer_of(data), "steps=4000", "save_every=5"]
    line = command(data, run, "fusion", *settings, ds="zero1.json")
    first = Ranks(line, data, ranks, tmp_path / "first")
    wait_for(lambda: any((run / "fusion" / "checkpoints").glob("step_*")))
    second = Ranks(line, data, ranks, log)
    assert second.wait(60) == [2] * ranks, log.read_text()
    said = log.read_text()
    assert "Traceback" not in said and said.count("error") == ranks
    assert f"fusion is in use: process {first.processes[0].pid} on {os.uname().nodename} since 20" in said
    assert first.wait(0.01) == [None] * ranks, (tmp_path / "first").read_text()
    for process in first.processes:
        os.kill(process.pid, signal.SIGKILL)
    first.wait(10)
    # The lock ended with its process.
    third = Ranks(line, data, ranks, log)
    wait_for(lambda: "resumed from" in log.read_text())
    third.kill()
    steps = [json.loads(row)["step"] for row in (run / "fusion" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def on_its_own_node(place: Path, rank: int) -> None:
    """As if each rank had a disk of its own at one path."""
    from pretrain.run import directory

    directory.SEEN_S = 0.5
    node = place / f"node{rank}"
    node.mkdir()
    os.chdir(node)


def cannot_write(place: Path, rank: int) -> None:
    write_text = Path.write_text

    def refuse(self, *args, **kwargs):
        if self.name == "rank00001":
            raise PermissionError(13, "Permission denied", str(self))
        return write_text(self, *args, **kwargs)

    Path.write_text = refuse


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (on_its_own_node, "run/vision is not the same directory for rank 1 on "),
        (cannot_write, "run/vision cannot be written by rank 1 on "),
    ],
)
def test_a_run_directory_that_a_rank_cannot_use_is_refused_before_the_first_step(data, tmp_path, prepare, says):
    log, place = tmp_path / "log", tmp_path / "run"
    line = command(data, Path("run") if prepare is on_its_own_node else place, "vision", tokenizer_of(data))
    ranks = Ranks(line, data, 2, log, partial(prepare, tmp_path))
    assert ranks.wait(60) == [2, 2], log.read_text()
    said = log.read_text()
    assert said.count(says) == 2 and "Traceback" not in said
    assert not list(tmp_path.rglob("metrics.jsonl")) and not list(tmp_path.rglob(".start_*"))


@pytest.mark.slow
def test_a_run_directory_that_nobody_can_write_is_one_sentence(data, tmp_path):
    (tmp_path / "file").touch()
    log = tmp_path / "log"
    ranks = Ranks(command(data, tmp_path / "file", "vision", tokenizer_of(data)), data, 2, log)
    assert ranks.wait(60) == [2, 2], log.read_text()
    assert log.read_text().count("file/vision cannot be written (Not a directory); make it writable") == 2
