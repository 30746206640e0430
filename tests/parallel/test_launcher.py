"""The variables of launchers, against each other."""

from __future__ import annotations

import os

import pytest

from pretrain import train
from pretrain.parallel.launcher import adopt_launcher

STEP = {"SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "MASTER_ADDR": "node", "MASTER_PORT": "20000"}
MEETING = {"MASTER_ADDR": "node", "MASTER_PORT": "20000"}


@pytest.fixture
def launched(monkeypatch):
    """Sets what a launcher would, and nothing else of that kind."""

    def launch(**variables: str) -> None:
        for name in (*os.environ,):
            if name.startswith("SLURM_") or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *MEETING):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):  # adopting may set them
            monkeypatch.setenv(name, os.environ.get(name, ""))
            if name not in variables:
                monkeypatch.delenv(name)

    return launch


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK='abc' is no whole number"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is no whole number"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE='0' is no whole number from 1 on"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK='' is no whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2", **MEETING}, "RANK=2 is not below WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1 is not below WORLD_SIZE=(not set: 1)"),
        ({"WORLD_SIZE": "2", **MEETING}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is no whole number"),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2", **MEETING},
            "LOCAL_RANK=2 is not below",
        ),
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node"}, "MASTER_PORT is not set for WORLD_SIZE=2"),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node", "MASTER_PORT": "99999"},
            "MASTER_PORT=99999 is no port",
        ),
        ({**STEP, "SLURM_PROCID": "2", "SLURM_NTASKS": "2"}, "SLURM_PROCID=2 is not below SLURM_NTASKS=2"),
        ({**STEP, "SLURM_PROCID": "1", "SLURM_NTASKS": "1"}, "SLURM_PROCID=1 is not below SLURM_NTASKS=1"),
        ({**STEP, "SLURM_PROCID": "x", "SLURM_NTASKS": "2"}, "SLURM_PROCID='x' is no whole number"),
        ({**STEP, "SLURM_NTASKS": "2"}, "SLURM_PROCID is not set under srun with SLURM_NTASKS=2"),
        ({**STEP, "SLURM_PROCID": "1"}, "SLURM_NTASKS is not set but there are several tasks (SLURM_PROCID=1)"),
        ({**STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "several tasks (SLURM_STEP_NUM_TASKS=2)"),
        ({**STEP, "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, "several tasks (SLURM_STEP_TASKS"),
    ],
)
def test_variables_that_do_not_go_together_are_one_sentence_and_2(launched, tmp_path, capsys, variables, says):
    launched(**variables)
    line = ["--recipe", "tiny", "--stage", "vision", "--ds", "x", "--run-dir", str(tmp_path)]
    assert train.main(line) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (None, None)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (None, None)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, (None, None)),
        ({"SLURM_NTASKS": "8"}, (None, None)),  # a shell of an allocation, without srun
        ({**STEP, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, ("1", "2")),
        ({**STEP, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "RANK": "3", "WORLD_SIZE": "4"}, ("3", "4")),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ("0", "1")),
    ],
)
def test_variables_that_go_together_are_adopted(launched, variables, place):
    launched(**variables)
    adopt_launcher()
    assert (os.environ.get("RANK"), os.environ.get("WORLD_SIZE")) == place


@pytest.mark.parametrize(
    ("variables", "here"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),4", "SLURM_NODEID": "2"}, "8"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),4", "SLURM_NODEID": "3"}, "4"),
        ({"SLURM_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}, "4"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "1"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "what"}, None),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "LOCAL_WORLD_SIZE": "2"}, "2"),  # somebody else knows better
        ({}, None),
    ],
)
def test_under_srun_a_rank_knows_how_many_share_its_node(launched, variables, here):
    """What sees to the second copy of ZeRO++ and to shared memory asks for it."""
    launched(**STEP, SLURM_PROCID="1", SLURM_NTASKS="28", **variables)
    adopt_launcher()
    assert os.environ.get("LOCAL_WORLD_SIZE") == here
