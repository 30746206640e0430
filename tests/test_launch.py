"""The SLURM scripts without SLURM: stand-ins for its commands write down how they are called."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small_run import ROOT

SCRIPTS = sorted((ROOT / "launch").rglob("*.sh")) + sorted((ROOT / "launch").glob("*.sbatch"))
SBATCH = """
echo "$@" >>"$CALLS"
echo "10$(wc -l <"$CALLS");cluster" # --parsable, with several clusters
"""
SCONTROL = """
echo "$@" >>"$CALLS"
case "$1 $2" in
    "show hostnames") echo node7; echo node8 ;;
    "show node") echo "NodeName=$3 Arch=x86_64"; echo "   NodeAddr=10.0.0.7 NodeHostName=$3 Version=22.05.8" ;;
    "show job") echo "   JobState=$STATE Reason=None Dependency=(null)" ;;
esac
"""
SRUN = """
echo "srun $*" >>"$CALLS"
echo "MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT OMP_NUM_THREADS=$OMP_NUM_THREADS" >>"$CALLS"
trap 'echo "srun got USR1" >>"$CALLS"; exit 75' USR1
trap 'echo "srun got TERM" >>"$CALLS"; exit 143' TERM
if [ -n "${SIGNAL:-}" ]; then
    kill -"$SIGNAL" "$PPID" # the batch script
    for _ in 1 2 3 4 5; do sleep 0.1; done
fi
exit "$CODE"
"""


@pytest.fixture
def slurm(tmp_path):
    """-> run(line, **environment) and the calls that sbatch, scontrol and srun got, as lines."""
    for name, body in (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_", "SBATCH_"))}
    kept |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "IMGLISH_PYTHON": sys.executable}

    def run(*line: str, cwd: Path = ROOT, **environment: str):
        calls.write_text("")
        done = subprocess.run(
            ["bash", *line], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=20
        )
        return done, calls.read_text().splitlines()

    return run


def stage(slurm, code: int, *, state: str = "RUNNING", job: str = "41", restarts: str = "", **environment: str):
    environment |= {"CODE": str(code), "STATE": state, "SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "node[7-8]"}
    environment |= {"SLURM_CPUS_PER_TASK": "12"} | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    return slurm("launch/stage.sbatch", "--stage", "vision", "--set", "a=1 2", **environment)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False).stderr == ""


def test_each_stage_of_a_chain_waits_for_the_one_before(slurm, tmp_path):
    done, calls = slurm(
        str(ROOT / "launch" / "chain.sh"), "a b c", "--recipe", "r", cwd=tmp_path, SBATCH_OPTIONS="--nodes=4 -p x"
    )
    assert done.stdout.splitlines() == ["a: job 101", "b: job 102", "c: job 103"]
    assert [" --dependency=" in call for call in calls] == [False, True, True]
    for call, name, before in zip(calls, "abc", ("", "101", "102"), strict=True):
        words = call.split()
        script = words.index("launch/stage.sbatch")
        assert words[script + 1 :] == ["--stage", name, "--recipe", "r"]
        assert {"--nodes=4", "-p", "x", "--kill-on-invalid-dep=yes"} <= set(words[:script])
        assert not before or f"--dependency=afterok:{before}" in words[:script]


def test_a_chain_without_arguments_says_how(slurm):
    done, calls = slurm("launch/chain.sh")
    assert done.returncode == 2
    assert "launch/chain.sh" in done.stderr and not calls


def test_a_chain_stops_where_sbatch_refuses(slurm, tmp_path):
    (tmp_path / "sbatch").write_text('#!/usr/bin/env bash\necho "$@" >>"$CALLS"; exit 1\n')
    done, calls = slurm("launch/chain.sh", "a b", "--recipe", "r")
    assert done.returncode == 1 and len(calls) == 1


def test_a_stage_gives_the_ranks_their_meeting_place(slurm):
    done, calls = stage(slurm, 0)
    assert done.returncode == 0, done.stderr
    assert "show node node7" in calls
    (srun,) = (call for call in calls if call.startswith("srun "))
    assert "--cpus-per-task=12 " in srun
    assert srun.endswith(f"{sys.executable} -m pretrain.train --stage vision --set a=1 2")
    (place,) = (call for call in calls if call.startswith("MASTER"))
    assert place.startswith("MASTER_ADDR=10.0.0.7 ") and place.endswith(" OMP_NUM_THREADS=12")


def test_another_life_meets_at_another_port(slurm):
    def port(**given: str) -> int:
        _, calls = stage(slurm, 0, **given)
        return int(next(call for call in calls if call.startswith("MASTER")).split()[1].removeprefix("MASTER_PORT="))

    ports = [port(), port(restarts="1"), port(job="42"), port(job="4000000000")]
    assert len(set(ports)) == 4
    assert all(1024 < p < 32768 for p in ports)  # below what the kernel hands out by itself


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        (0, "RUNNING", False),
        (1, "RUNNING", False),
        (2, "RUNNING", False),
        (69, "RUNNING", False),  # another rank died: who knows whether it will again
        (137, "RUNNING", False),
        (75, "RUNNING", True),
        (138, "RUNNING", True),  # USR1 before the run listened
        (75, "SIGNALING", True),  # SLURM is still at it
        (75, "COMPLETING", False),  # scancel, or out of time
    ],
)
def test_a_stage_requeues_only_what_a_signal_stopped(slurm, code, state, requeued):
    done, calls = stage(slurm, code, state=state)
    assert done.returncode == code
    assert ("requeue 41" in calls) == requeued


def test_usr1_to_the_batch_script_reaches_the_step(slurm):
    done, calls = stage(slurm, 0, SIGNAL="USR1")
    assert "srun got USR1" in calls
    assert done.returncode == 75 and "requeue 41" in calls


def test_term_to_the_batch_script_does_not_reach_srun_which_would_kill_the_tasks(slurm):
    done, calls = stage(slurm, 75, SIGNAL="TERM")
    assert "srun got TERM" not in calls
    assert done.returncode == 75 and "requeue 41" in calls


def test_a_stage_says_when_it_is_not_in_the_checkout(slurm, tmp_path):
    done, calls = slurm(str(ROOT / "launch" / "stage.sbatch"), cwd=tmp_path)
    assert done.returncode == 2 and not calls
    assert "not the checkout" in done.stderr
