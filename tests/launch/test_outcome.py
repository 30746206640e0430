"""What a job does after its ranks have failed."""

from __future__ import annotations

import json
import time

import pytest

from pretrain.launch.exclude import to_avoid
from pretrain.launch.outcome import (
    MOST,
    PREFLIGHT,
    RESTARTS,
    Failure,
    Restart,
    decide,
    first_failure,
    main,
    read_restarts,
    without_progress,
)

LOST = "12:00:02 rank 0 of 3: another rank died or hung up (in step 3); checkpoints are intact"
HANG = "12:00:01 rank 0 of 2: rank 1 on node7 hangs in step 9: it did not come to the collective in which others wait"


@pytest.fixture
def logs(tmp_path):
    def write(*texts: str, **others: str):
        for rank, text in enumerate(texts):
            (tmp_path / f"rank{rank:05d}.log").write_text(text + "\n" * bool(text))
        for name, text in others.items():
            (tmp_path / f"{name}.log").write_text(text + "\n")
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("ranks", "others", "first", "node"),
    [
        ([LOST, "12:00:03 error: late", "12:00:01 error on rank 2: first"], {}, "rank00002.log:12:00:01 error on", ""),
        (
            [LOST, "12:00:01 bug on rank 1\nTraceback\nKeyError: 3", LOST],
            {},
            "rank00001.log:12:00:01 bug on rank 1: KeyError: 3",
            "",
        ),
        (["", "12:00:01 rank 1 of 3: a data worker died", LOST], {}, "rank00001.log:12:00:01 rank 1 of 3: a data", ""),
        ([LOST, "", ""], {}, "rank00000.log:12:00:02 rank 0 of 3: another rank died", ""),
        ([LOST, ""], {"srun": "srun: error: node8: task 1: Killed"}, "srun: error: node8: task 1: Killed", "node8"),
        ([HANG, LOST], {"srun": "srun: error: node8: task 1: Exited with exit code 69"}, "rank00000.log:", "node7"),
        (
            [LOST, ""],
            {"srun": "srun: error: n8: task 1: Killed\nsrun: error: Aborting, io error and missing step on node 1"},
            "srun: error: Aborting, io error and missing step on node 1",
            "n9",
        ),
        ([LOST, ""], {"srun": "srun: error: Node failure on n9"}, "srun: error: Node failure on n9", "n9"),
        (["12:00:01 step 1", "ModuleNotFoundError: No", ""], {}, "rank00001.log:ModuleNotFoundError: No", ""),
        (["", "", ""], {}, "", ""),
        (["", ""], {"preflight00000": "12:00:01 bad node n5: no GPU"}, f"{PREFLIGHT}:12:00:01 bad node n5: no", "n5"),
        ([], {"preflight00001": "12:00:01 error: n5 is lost"}, "preflight00001.log:12:00:01 error: n5 is lost", ""),
    ],
)
def test_the_error_that_came_first_and_its_node(logs, monkeypatch, ranks, others, first, node):
    monkeypatch.setenv("IMGLISH_NODES", "n8 n9 ")
    failure = first_failure(logs(*ranks, **others))
    assert failure.first.startswith(first) and bool(failure.first) == bool(first) and failure.node == node


def restart(reached: int, action: str = "again", node: str = "") -> Restart:
    return Restart(1.0, "41", 69, reached, action, node, "")


KILLED = Failure("srun: error: node8: task 1: Killed", "node8")
DISK = Failure("rank00000.log:12:00:01 error: [Errno 28] rank 1: No space left on device (/x)", "")


@pytest.mark.parametrize(
    ("failure", "before", "reached", "action", "pause"),
    [
        (KILLED, [], 0, "again", 0),
        (KILLED, [restart(5)] * MOST, 6, "again", 0),  # it advances
        (KILLED, [restart(4), restart(5), restart(5)], 5, "again", 60),
        (KILLED, [restart(5)] * MOST, 5, "end", 0),
        (KILLED, [restart(5), restart(5, "end")], 5, "again", 0),  # somebody started it again
        (KILLED, [restart(4, node="node8")], 5, "requeue", 0),
        (KILLED, [restart(4, node="node7")], 5, "again", 0),
        (Failure(f"{PREFLIGHT}:bad node n5: no", "n5"), [], 0, "requeue", 0),
        (DISK, [], 5, "again", 20),
        (Failure("rank00001.log:12:00:01 error on rank 1: [Errno 5] Input/output error: '/x'", ""), [], 5, "again", 20),
        (
            Failure("rank00000.log:12:00:01 error: cannot save step 5 to /x: rank 1: Disk quota exceeded (/x/y)", ""),
            [],
            5,
            "again",
            20,
        ),
        (Failure("rank00000.log:12:00:01 error: step 3: the loss is nan", ""), [], 5, "end", 0),
        (Failure("rank00000.log:12:00:01 error: [Errno 2] No such file or directory: '/x'", ""), [], 5, "end", 0),
        (Failure("rank00000.log:12:00:01 error: rank 0 of 2: the process group did not form", ""), [], 5, "again", 0),
        (Failure("rank00000.log:12:00:01 bug on rank 1: KeyError", ""), [], 5, "again", 0),
        (Failure("rank00000.log:12:00:01 bug on rank 1: KeyError", ""), [restart(5)], 5, "end", 0),
    ],
)
def test_a_run_is_started_again_while_it_advances(failure, before, reached, action, pause):
    assert decide(failure, before, reached)[::2] == (action, pause)


def test_progress_is_a_step_that_no_life_before_had_reached():
    assert without_progress([restart(3), restart(5), restart(5)], 5) == 2
    assert without_progress([restart(3), restart(5)], 6) == 0


def test_each_decision_is_a_line(logs, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    stage = tmp_path / "run" / "vision"
    stage.mkdir(parents=True)
    (stage / "metrics.jsonl").write_text('{"step": 7}\n{"step": 8}\n{"st')
    line = ["--logs", str(logs(HANG, "")), "--code", "69", "--run-dir", str(tmp_path / "run"), "--stage", "vision"]
    assert main([*line, "--set", "a=1"]) == 0
    said = capsys.readouterr()
    assert said.out == "again 0\n" and "first error: rank00000.log:12:00:01 rank 0 of 2: rank 1 on node7" in said.err
    (noted,) = read_restarts(stage)
    assert (noted.job, noted.code, noted.reached, noted.action, noted.node) == ("41", 69, 8, "again", "node7")
    assert abs(noted.time - time.time()) < 60
    (stage / RESTARTS).write_text((stage / RESTARTS).read_text() + '{"job": 3}\n[[[\n')
    assert read_restarts(stage) == [noted], "a damaged line is left out"
    (stage / RESTARTS).write_text(json.dumps(noted.__dict__ | {"node": "", "reached": 8}) + "\n")
    main(line)
    assert capsys.readouterr().out == "again 15\n", "it came no further"


SCONTROL = """
case "$*" in
    *"show job"*) echo "JobId=41 Partition=gpu NumNodes=2-2 ExcNodeList=${EXCLUDED}" ;;
    "show hostnames"*) echo g4 ;;
esac
"""


@pytest.mark.parametrize(
    ("node", "excluded", "says"),
    [
        ("g1", "(null)", "g1"),
        ("g2", "g4", "only 1 other nodes of partition gpu are left, and the job needs 2"),
        ("g9", "(null)", "partition gpu has no node g9"),
    ],
)
def test_a_node_is_avoided_where_enough_others_are(tmp_path, monkeypatch, node, excluded, says):
    sinfo = "for i in 1 2 4; do echo \"g$i|alloc\"; done; echo 'g5|down*'"
    for name, body in (("scontrol", SCONTROL), ("sinfo", sinfo)):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("EXCLUDED", excluded)
    if says == node:
        assert to_avoid(node, "41") == says
    else:
        with pytest.raises(ValueError, match=says):
            to_avoid(node, "41")
