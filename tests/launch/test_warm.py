"""Ranks that are forked again in place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.restarts import read_restarts
from tests.small_run import ROOT

# A rank of two lives; what befalls rank 1 in the first one is its last word.
RANK = """
import os, signal, sys, time
def main(words):
    number, (_, run, _, stage, fate) = int(os.environ["SLURM_PROCID"]), words
    mark = f"{run}/{stage}/begun{number}"
    if os.path.exists(mark):
        return 0
    open(mark, "w").close()
    print(time.strftime("%H:%M:%S"), "life", flush=True)
    if number == 1 and fate == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 1 and fate == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60 if fate == "signalled" else 0.3)
    return 69
"""
START = "import sys; from pretrain.launch import warm; warm.preload, warm.HANG_S = int, 1.0; sys.exit(warm.main())"


def start(place: Path, fate: str) -> list[subprocess.Popen]:
    (place / "rank_of_a_test.py").write_text(RANK)
    (place / "run" / "vision").mkdir(parents=True)
    (place / "job").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1] - 2)  # the second one after it is the store's
    base = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    base |= {"PYTHONPATH": f"{ROOT}:{place}", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    base |= {"SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "IMGLISH_PREFLIGHT": "no"}
    base |= {"SLURM_JOB_ID": "41", "IMGLISH_JOB_LOG": str(place / "job.log"), "SLURMD_NODENAME": "n7"}
    words = ["--run-dir", str(place / "run"), "--stage", "vision", fate]
    line = [sys.executable, "-c", START, "--logs", str(place / "job"), "rank_of_a_test", *words]
    processes = []
    for number in ("0", "1"):
        with (place / "job" / f"rank0000{number}.log").open("w") as log:
            more = {"SLURM_PROCID": number, "SLURM_LOCALID": number}
            processes.append(subprocess.Popen(line, env=base | more, stdout=log, stderr=log))
    return processes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fate", "first"),
    [("killed", "rank 1 on n7 was killed by SIGKILL"), ("stopped", "life")],  # one that is stopped says nothing
)
def test_lost_ranks_are_forked_again(tmp_path, fate, first):
    processes = start(tmp_path, fate)
    assert [process.wait(60) for process in processes] == [0, 0]
    (noted,) = read_restarts(tmp_path / "run" / "vision")
    assert noted.action == "again" and first in noted.first and (tmp_path / "job-again1").is_dir()
    said = (tmp_path / "job.log").read_text()
    assert f"first error: {noted.first}" in said and "-again1" in said


@pytest.mark.slow
def test_a_signal_reaches_the_rank_and_no_life_follows(tmp_path):
    processes = start(tmp_path, "signalled")
    end = time.monotonic() + 60
    while not (tmp_path / "run" / "vision" / "begun1").exists() and time.monotonic() < end:
        time.sleep(0.05)
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    assert [process.wait(60) for process in processes] == [138, 138], "as srun would say of a rank without a handler"
    assert not read_restarts(tmp_path / "run" / "vision")
