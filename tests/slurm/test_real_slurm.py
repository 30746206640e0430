"""The launch scripts on a real SLURM of two nodes on this machine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.fault_runs.compare import Ending, compare
from benchmarks.slurm_runs.strike import Target, kill_rank
from pretrain.launch.outcome import reached_step
from pretrain.lives import read_lives
from pretrain.restarts import read_restarts
from tests.slurm.one_host import slurm, wait_for, why_not
from tests.small_run import ROOT, Ranks, check_weights, command, environment, tokenizer_of, train_stage

pytestmark = pytest.mark.slow
ENDS_S = 120.0  # a stage takes some ten seconds, on a busy machine longer
CLUSTER = """
GPU_JOB=(--partition=main --nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1 --mem=0 --time=10)
SRUN=(--cpu-bind=none)
CONTAINER=(env INSIDE=yes)
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 IMGLISH_LOCAL={local} IMGLISH_PREFLIGHT=${{IMGLISH_PREFLIGHT:-no}}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, data):
    """The environment of a user on the login node."""
    if reason := why_not():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    place = tmp_path_factory.mktemp("cluster")
    (place / "my.env").write_text(CLUSTER.format(local=place / "local"))
    (place / "slurm").mkdir()
    # Looks like an environment, and is copied in no time.
    python = place / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (place / "env" / "pyvenv.cfg").touch()
    python.write_text(
        f'#!/usr/bin/env bash\necho "inside: ${{INSIDE:-no}}, python is $0" >&2\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    mine = {
        "IMGLISH_LOCAL": str(place / "local"),
        "IMGLISH_CLUSTER": str(place / "my.env"),
        "IMGLISH_PYTHON": str(python),
    }
    with slurm(place / "slurm") as more:
        base = {name: value for name, value in environment(data).items() if not name.startswith("SLURM_")}
        yield base | mine | more


@pytest.fixture
def submit(cluster, data, tmp_path):
    """-> submit(script, words): the outcome of a script of launch/, for a run whose tokenizer is trained."""
    shutil.copytree(data / "start", tmp_path / "run")
    line = ["--recipe", str(data / "recipe.py"), "--ds", "ds_configs/zero1.json", "--run-dir", str(tmp_path / "run")]

    def call(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
        whole = ["bash", *words, *line]
        return subprocess.run(whole, cwd=ROOT, env=cluster | more, capture_output=True, text=True, timeout=100)

    return call


def jobs_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return [line.split()[-1] for line in done.stdout.splitlines() if "job" in line]


def logs(run: Path, job: str) -> tuple[str, list[Path]]:
    """The job's own log and the logs of its ranks, over all its lives."""
    (own,) = (run / "logs").glob(f"*-{job}.log")
    return own.read_text(), sorted((run / "logs").glob(f"*-{job}*/rank*.log"))


def test_a_chain_runs_over_two_nodes_and_may_be_called_again(submit, cluster, data, tmp_path):
    vision, language = jobs = jobs_of(submit("launch/chain.sh", "tokenizer vision language"))
    again = submit("launch/chain.sh", "tokenizer vision language")
    assert jobs_of(again) == jobs and "tokenizer: finished" in again.stdout
    alone = train_stage(data, tmp_path / "alone", "vision", tokenizer_of(data))
    assert alone.returncode == 0, alone.stderr
    assert [wait_for(job, cluster, ENDS_S) for job in jobs] == ["COMPLETED"] * 2, logs(tmp_path / "run", vision)
    check_weights(tmp_path / "run" / "vision", tmp_path / "alone" / "vision", most=1e-5)
    said, ranks = logs(tmp_path / "run", language)
    *_, first, second = ranks  # of the last life: SLURM starts a job again whose node was too busy to answer
    assert "on node[1-2]: the ranks write to" in said
    assert (first.name, second.name) == ("rank00000.log", "rank00001.log")
    assert "finished at step 3" in first.read_text()
    assert f"inside: yes, python is {cluster['IMGLISH_LOCAL']}/" in first.read_text(), "the node's copy"
    done = submit("launch/chain.sh", "vision language")
    assert done.stdout == "vision: finished\nlanguage: finished\n"


def test_a_failed_stage_says_what_came_first_and_takes_the_later_ones_away(submit, cluster, tmp_path):
    vision, language = jobs_of(submit("launch/chain.sh", "vision language", "--set", "optim.lr=1e30"))
    assert wait_for(vision, cluster, ENDS_S) == "FAILED" and wait_for(language, cluster, 20) == "CANCELLED"
    said, _ = logs(tmp_path / "run", vision)
    assert "first error: rank0000" in said and "has diverged" in said


def test_a_job_that_is_asked_to_stop_saves_and_goes_on_in_another_life(submit, cluster, tmp_path):
    more = ("--set", "steps=100000", "--set", "save_every=100000")
    (job,) = jobs_of(submit("launch/submit.sh", "launch/stage.sbatch", "--stage", "vision", *more))
    metrics, end = tmp_path / "run" / "vision" / "metrics.jsonl", time.monotonic() + ENDS_S
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < end:
        time.sleep(0.2)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job], env=cluster, check=True)
    while "resumed from" not in "".join(path.read_text() for path in logs(tmp_path / "run", job)[1]):
        assert time.monotonic() < end, logs(tmp_path / "run", job)
        time.sleep(0.2)
    subprocess.run(["scancel", job], env=cluster, check=True)
    said, ranks = logs(tmp_path / "run", job)
    assert "requeueing the job" in said and len({path.parent for path in ranks}) == 2
    assert wait_for(job, cluster, 30) == "CANCELLED"


def test_a_rank_that_is_killed_starts_again_in_place_on_nodes_that_are_fit(submit, cluster, tmp_path):
    more = ("--set", "steps=100000", "--set", "save_every=2", "--set", "keep=1")
    done = submit("launch/submit.sh", "launch/stage.sbatch", "--stage", "vision", *more, IMGLISH_PREFLIGHT="yes")
    (job,), stage, end = jobs_of(done), tmp_path / "run" / "vision", time.monotonic() + 2 * ENDS_S
    while reached_step(stage) < 4 and time.monotonic() < end:
        time.sleep(0.2)
    kill_rank(Target(job, tmp_path / "run", Path(cluster["SLURM_CONF"]).parent, cluster), 1)
    while not (lives := read_lives(stage))[1:] or reached_step(stage) <= lives[1].start:
        assert time.monotonic() < end, logs(tmp_path / "run", job)
        time.sleep(0.2)
    subprocess.run(["scancel", job], env=cluster, check=True)
    assert wait_for(job, cluster, 30) == "CANCELLED"
    (restart,) = read_restarts(stage)
    assert restart.action == "again" and "rank 1 on node2 was killed by SIGKILL" in restart.first
    said, ranks = logs(tmp_path / "run", job)
    assert f"first error: {restart.first}" in said and ranks[-1].parent.name.endswith(f"{job}-again1")
    for life in {path.parent for path in ranks}:
        assert "2 nodes are fit" in (life / "preflight00000.log").read_text()


@pytest.mark.timeout(600)
def test_a_chain_under_zero3_has_the_bits_of_one_node(cluster, data, tmp_path):
    """2 nodes with 2 ranks, against 4 ranks of one node."""
    runs = {name: tmp_path / name for name in ("two", "one")}
    for run in runs.values():
        shutil.copytree(data / "start", run)
    stages, settings = ["vision", "language", "fusion", "retrieval"], ["--set", "steps=2", "--set", "save_every=2"]
    line = ["bash", "launch/chain.sh", " ".join(stages), "--recipe", str(data / "recipe.py"), *settings]
    line += ["--ds", "ds_configs/zero3.json", "--run-dir", str(runs["two"])]
    more = {"SBATCH_OPTIONS": "--ntasks-per-node=2 --gpus-per-node=2"}
    jobs = jobs_of(subprocess.run(line, cwd=ROOT, env=cluster | more, capture_output=True, text=True, timeout=200))
    for stage, job in zip(stages, jobs, strict=True):
        assert wait_for(job, cluster, 2 * ENDS_S) == "COMPLETED", logs(runs["two"], job)
        log = tmp_path / f"{stage}.log"
        alone = command(data, runs["one"], stage, "steps=2", "save_every=2", ds="zero3.json")
        assert Ranks(alone, data, 4, log).wait(2 * ENDS_S) == [0] * 4, log.read_text()
        assert compare(runs["two"] / stage, runs["one"] / stage) == Ending([], 0, 0, 0.0), stage


def test_a_benchmark_that_is_ended_leaves_no_daemons_and_no_file_systems(tmp_path):
    if reason := why_not():
        pytest.skip(reason)
    work = tmp_path / "work"
    line = [sys.executable, "-m", "benchmarks.slurm_faults", "scenarios", "--kinds", "USR1", "--work", str(work)]
    own = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(line, cwd=ROOT, env=own, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    end = time.monotonic() + ENDS_S
    try:
        while len(files := [file for file in (work / "slurm").glob("*.pid") if file.read_text().strip()]) < 5:
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.1)
        daemons = [int(file.read_text()) for file in files]
        process.terminate()
        assert process.wait(ENDS_S) == 128 + signal.SIGTERM
        assert not [pid for pid in daemons if Path(f"/proc/{pid}").exists()]
        assert str(work) not in Path("/proc/mounts").read_text()
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--partition=mian"], "--partition=mian is no partition of this cluster; did you mean main"),
        (["--nodes=3"], "--nodes=3 is more than the 2 nodes of partition main"),
        (["--gpus-per-node=4", "--ntasks-per-node=4"], "a node has 2 (a100); use --gpus-per-node=2 or less"),
        (["--mem=64G"], "is more than the 16000 MiB of a node"),
        (["--time=2-0"], "over the limit of partition main, 60 minutes"),
        (["--constraint=nothing"], "sbatch would refuse this job: Invalid feature specification"),
    ],
)
def test_what_slurm_would_refuse_or_never_start_is_refused_before(cluster, data, monkeypatch, capsys, options, says):
    from pretrain.launch.__main__ import main

    monkeypatch.setenv("SLURM_CONF", cluster["SLURM_CONF"])
    monkeypatch.setenv("DATA", str(data))
    job = ["--partition=main", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
    job += ["--cpus-per-task=2", *options]  # without, a note stands before the refusal
    line = ["--recipe", str(data / "recipe.py"), "--ds", str(ROOT / "ds_configs" / "zero1.json")]
    line += ["--run-dir", str(data / "none"), "--stage", "tokenizer"]
    assert main([*(f"--option={word}" for word in job), str(ROOT / "launch" / "stage.sbatch"), *line]) == 2
    said = capsys.readouterr()
    assert says in said.err and said.err.count("\n") == 1 and not said.out
