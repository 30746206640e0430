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
    "-o show") echo "JobId=41 Partition=gpu NumNodes=2 ExcNodeList=(null)" ;;
    "show job") echo "   JobState=$STATE Reason=None Dependency=(null)" ;;
    "update JobId=41") [ "$(grep -c "^update" "$CALLS")" -gt 2 ] ;; # not before the job is in the queue
esac
"""
SRUN = """
if [[ "$*" == *preflight* ]]; then
    echo "preflight $*" >>"$CALLS"
    exit "${PREFLIGHT:-0}"
fi
echo "srun $*" >>"$CALLS"
echo "MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT" $(env | grep ^OMP_ | sort) >>"$CALLS"
trap 'echo "srun got USR1" >>"$CALLS"; exit 75' USR1
trap 'echo "srun got TERM" >>"$CALLS"; exit 143' TERM
if [ -n "${SIGNAL:-}" ]; then
    kill -"$SIGNAL" "$PPID" # the batch script
    for _ in 1 2 3 4 5; do sleep 0.1; done
fi
life=$(grep -c "^srun " "$CALLS")
set -- $CODE # of the lives, and the last one for those that follow
[ "$life" -lt $# ] && exit "${!life}" || exit "${!#}"
"""
SINFO = """
for node in ${NODES:-7 8}; do echo "node$node|alloc"; done
"""
SLEEP = """
[[ $1 == 0.* ]] || echo "sleep $1" >>"$CALLS"
exec /bin/sleep $([[ $1 == 0.* ]] && echo "$1" || echo 0)
"""


@pytest.fixture
def slurm(tmp_path):
    """-> run(line, **environment) and the calls that sbatch, scontrol and srun got, as lines."""
    stand_ins = (("sbatch", SBATCH), ("scontrol", SCONTROL), ("srun", SRUN), ("sleep", SLEEP), ("sinfo", SINFO))
    for name, body in stand_ins:
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMP_", "SBATCH_", "IMGLISH_"))
    }
    kept |= {"IMGLISH_LOGS": str(tmp_path / "logs")}
    kept |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "IMGLISH_PYTHON": sys.executable}

    def run(*line: str, cwd: Path = ROOT, **environment: str):
        calls.write_text("")
        done = subprocess.run(
            ["bash", *line], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=20
        )
        return done, calls.read_text().splitlines()

    return run


def stage(slurm, code: int | str, *, state: str = "RUNNING", job: str = "41", restarts: str = "", **environment: str):
    environment = (
        {"SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "2"}
        | environment
        | {
            "CODE": str(code),
            "STATE": state,
            "SLURM_JOB_ID": job,
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_NUM_NODES": "2",
        }
    )
    environment |= {"SLURM_CPUS_PER_TASK": "12"} | ({"SLURM_RESTART_COUNT": restarts} if restarts else {})
    # Its directory cannot be made: no progress is known from one call to the next.
    words = ["--stage", "vision", "--run-dir", "/dev/null/run", "--set", "a=1 2"]
    return slurm("launch/stage.sbatch", *words, **environment)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False).stderr == ""


def words_of(slurm, tmp_path, *line: str, more: str = "", **environment: str):
    """What a script calls Python with, on a cluster whose file ends with `more`: -> outcome, words."""
    python, mine = tmp_path / "python", tmp_path / "my.env"
    python.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@" >"$CALLS"\n')
    python.chmod(0o755)
    mine.write_text(f"GPU_JOB=(--partition=gpu --mem=0)\nCPU_JOB=(-p cpu)\nGPU=h100\n{more}\n")
    return slurm(*line, **{"IMGLISH_PYTHON": str(python), "IMGLISH_CLUSTER": str(mine)} | environment)


def test_a_chain_goes_to_the_checks_with_the_clusters_options(slurm, tmp_path):
    chain = [str(ROOT / "launch" / "chain.sh"), "a b", "--recipe", "r", "--dry-run", "--set", "x=1 2"]
    done, words = words_of(slurm, tmp_path, *chain, cwd=tmp_path, SBATCH_OPTIONS="--nodes=4 -p x")
    assert done.returncode == 0, done.stderr
    options = [f"--option={word}" for word in ("--partition=gpu", "--mem=0", "--nodes=4", "-p", "x")]
    checks = ["-m", "pretrain.launch", "--chain=a b", "--dry-run", "--gpu", "h100"]
    assert words == [*checks, *options, "launch/stage.sbatch", "--recipe", "r", "--set", "x=1 2"]
    first = [chain[0], "--dry-run", *(word for word in chain[1:] if word != "--dry-run")]
    assert words_of(slurm, tmp_path, *first, cwd=tmp_path, SBATCH_OPTIONS="--nodes=4 -p x")[1] == words


@pytest.mark.parametrize("script", ["stage", "bench", "prepare"])
def test_a_batch_script_outside_of_a_job_submits_itself(slurm, tmp_path, script):
    done, words = words_of(slurm, tmp_path, f"launch/{script}.sbatch", "--dry-run", "--out", "x")
    assert done.returncode == 0, done.stderr
    options = (
        ["--option=-p", "--option=cpu"] if script == "prepare" else ["--option=--partition=gpu", "--option=--mem=0"]
    )
    assert words[2:] == ["--dry-run", "--gpu", "h100", *options, f"launch/{script}.sbatch", "--out", "x"]


@pytest.mark.parametrize(
    ("more", "environment", "says"),
    [
        ("", {"IMGLISH_CLUSTER": "/nowhere/my.env"}, "IMGLISH_CLUSTER=/nowhere/my.env does not exist"),
        ("export DATA=/mine", {"DATA": "/yours"}, "DATA=/yours is exported, but "),
        ("GPU_JOBS=(--mem=0)", {}, "no script reads GPU_JOBS; use GPU_JOB"),
        ("partition = gpu", {}, "line 4: partition: command not found"),
        ("GPU_JOB=(", {}, "line 4: "),
        ("export A=$NOT_SET", {}, "line 4: NOT_SET: unbound variable"),
    ],
)
def test_what_is_wrong_with_the_clusters_file_is_one_sentence(slurm, tmp_path, more, environment, says):
    done, _ = words_of(slurm, tmp_path, "launch/submit.sh", "launch/stage.sbatch", more=more, **environment)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_the_clusters_file_may_lengthen_paths(slurm, tmp_path):
    line, more = ("launch/submit.sh", "launch/stage.sbatch"), "export DATA=/mine PATH=/more:$PATH"
    done, words = words_of(slurm, tmp_path, *line, more=more)
    assert done.returncode == 0 and "launch/stage.sbatch" in words, done.stderr


def test_without_a_clusters_file_submitting_says_how_to_make_one(slurm, tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "launch").mkdir(parents=True)
    for name in ("submit.sh", "env"):
        (checkout / "launch" / name).symlink_to(ROOT / "launch" / name)
    done, _ = slurm(str(checkout / "launch" / "submit.sh"), "launch/stage.sbatch")
    assert done.returncode == 2 and "cp launch/cluster.env.example launch/cluster.env" in done.stderr


@pytest.mark.parametrize(
    "line", [["launch/chain.sh"], ["launch/chain.sh", "--recipe", "r"], ["launch/submit.sh", "-N1"]]
)
def test_a_line_without_stages_or_script_says_how(slurm, tmp_path, line):
    done, words = words_of(slurm, tmp_path, *line)
    assert done.returncode == 2 and not words
    assert f"bash {line[0]}" in done.stderr


CALLED = [script for script in SCRIPTS if script.name not in ("cluster.sh", "job.sh", "rank.sh", "usage.sh")]


@pytest.mark.parametrize("script", CALLED, ids=lambda path: path.name)
def test_help_asks_for_no_cluster_and_starts_nothing(slurm, tmp_path, script):
    done, words = words_of(slurm, tmp_path, str(script), "--help", cwd=tmp_path, IMGLISH_CLUSTER="/nowhere/my.env")
    assert done.returncode == 0 and not words and not done.stderr
    assert script.name in done.stdout and "#!" not in done.stdout and "SBATCH " not in done.stdout


def test_the_example_of_a_clusters_file_is_read_as_it_is(slurm, tmp_path):
    example = str(ROOT / "launch" / "cluster.env.example")
    done, words = words_of(slurm, tmp_path, "launch/submit.sh", "launch/stage.sbatch", IMGLISH_CLUSTER=example)
    assert done.returncode == 0 and "--option=--gpus-per-node=8" in words, done.stderr


def test_a_stage_gives_the_ranks_their_meeting_place(slurm):
    done, calls = stage(slurm, 0)
    assert done.returncode == 0, done.stderr
    assert "show node node7" in calls
    (srun,) = (call for call in calls if call.startswith("srun "))
    assert "--cpus-per-task=12 " in srun
    words = "pretrain.train --stage vision --run-dir /dev/null/run --set a=1 2"
    assert "bash launch/env/rank.sh -m pretrain.launch.warm --logs " in srun and srun.endswith(f" --life 0 {words}")
    _, calls = stage(slurm, 0, IMGLISH_WARM="no")
    assert any(call.endswith(f"bash launch/env/rank.sh -m {words}") for call in calls)
    (place,) = (call for call in calls if call.startswith("MASTER"))
    assert place.startswith("MASTER_ADDR=10.0.0.7 ") and place.endswith(" OMP_NUM_THREADS=12 OMP_WAIT_POLICY=PASSIVE")


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


@pytest.mark.parametrize(
    ("codes", "state", "lives", "code"),
    [
        ("69 0", "RUNNING", 2, 0),
        ("137 1 0", "RUNNING", 3, 0),
        ("69 75", "RUNNING", 2, 75),
        ("69", "RUNNING", 4, 69),  # it does not end by itself
        ("69 0", "COMPLETING", 1, 69),  # scancel, or out of time
        ("69 0", "FAILED", 1, 69),
    ],
)
def test_ranks_that_were_lost_are_started_again_in_place(slurm, codes, state, lives, code):
    done, calls = stage(slurm, codes, state=state)
    assert done.returncode == code, done.stderr
    starts = [call for call in calls if call.startswith("srun ")]
    ports = [call for call in calls if call.startswith("MASTER_")]
    assert len(starts) == lives == len(set(ports)), "each life meets at a port of its own"
    assert ("logs/job-41-again1/rank" in starts[-1]) == (lives == 2)
    assert ("requeue 41" in calls) == (code == 75)


def test_nodes_are_checked_before_each_start(slurm, tmp_path):
    _, calls = stage(slurm, "69 0", IMGLISH_WARM="no")
    kinds = [call.split()[0] for call in calls if call.startswith(("preflight ", "srun "))]
    assert kinds == ["preflight", "srun"] * 2
    assert "--ntasks-per-node=1 " in next(call for call in calls if call.startswith("preflight "))
    for more in ({"IMGLISH_WARM": "no", "IMGLISH_PREFLIGHT": "no"}, {}):  # warm.py checks them itself
        _, calls = stage(slurm, 0, **more)
        assert not [call for call in calls if call.startswith("preflight ")]


def test_nothing_is_started_on_a_bad_node(slurm, tmp_path):
    logs = tmp_path / "logs" / "job-41"
    logs.mkdir(parents=True)
    (logs / "preflight00000.log").write_text("12:00:01 bad node node8: /dev/shm has 3 MiB free\n")
    done, calls = stage(slurm, 0, PREFLIGHT="69", IMGLISH_WARM="no")
    assert done.returncode == 69 and not [call for call in calls if call.startswith("srun ")]
    assert "first error: preflight00000.log:12:00:01 bad node node8: /dev/shm has" in done.stderr
    assert "but cannot be left out: only 1 other nodes of partition gpu are left" in done.stderr
    assert "requeue 41" not in calls
    done, calls = stage(slurm, 0, PREFLIGHT="69", IMGLISH_WARM="no", NODES="7 8 9")
    assert done.returncode == 69 and "to go on without a bad node; requeueing" in done.stdout
    assert calls[calls.index("requeue 41") + 1 :] == ["update JobId=41 ExcNodeList=node8"] * 3, "SLURM took the third"


def test_a_users_mistake_is_not_tried_again(slurm, tmp_path):
    logs = tmp_path / "logs" / "job-41"
    logs.mkdir(parents=True)
    (logs / "rank00000.log").write_text("12:00:01 error: optim.lr=0 is wrong; use more\n")
    done, calls = stage(slurm, 2)
    assert done.returncode == 2 and len([call for call in calls if call.startswith("srun ")]) == 1
    assert "first error: rank00000.log:12:00:01 error: optim.lr=0" in done.stderr


def test_a_full_disk_is_waited_for(slurm, tmp_path):
    logs = tmp_path / "logs" / "job-41"
    logs.mkdir(parents=True)
    (logs / "rank00000.log").write_text("12:00:01 error: [Errno 28] No space left on device: '/x'\n")
    done, calls = stage(slurm, "2 0")
    assert done.returncode == 0 and "sleep 20" in calls, calls


def test_a_signal_between_two_lives_puts_the_job_into_the_queue(slurm):
    done, calls = stage(slurm, 69, SIGNAL="USR1")  # the stand-in ends with 75
    assert done.returncode == 75 and "requeue 41" in calls


def test_usr1_to_the_batch_script_reaches_the_step(slurm):
    done, calls = stage(slurm, 0, SIGNAL="USR1")
    assert "srun got USR1" in calls
    assert done.returncode == 75 and "requeue 41" in calls


def test_term_to_the_batch_script_does_not_reach_srun_which_would_kill_the_tasks(slurm):
    done, calls = stage(slurm, 75, SIGNAL="TERM")
    assert "srun got TERM" not in calls
    assert done.returncode == 75 and "requeue 41" in calls


def test_a_stage_says_when_it_is_not_in_the_checkout(slurm, tmp_path):
    done, calls = slurm(str(ROOT / "launch" / "stage.sbatch"), cwd=tmp_path, SLURM_JOB_ID="41")
    assert done.returncode == 2 and not calls
    assert "not the checkout" in done.stderr


def test_a_python_of_ones_own_needs_no_environment_of_ours(slurm, tmp_path):
    (tmp_path / "python").symlink_to(sys.executable)
    done, calls = stage(slurm, 0, IMGLISH_PYTHON=str(tmp_path / "python"))
    assert done.returncode == 0 and any(call.startswith("srun ") for call in calls), done.stderr


def test_what_fails_before_the_ranks_start_is_said(slurm, tmp_path):
    (tmp_path / "my.env").write_text("in_job() { module load nothing; }\n")
    done, calls = stage(slurm, 0, IMGLISH_CLUSTER=str(tmp_path / "my.env"))
    assert done.returncode == 127 and not calls and "module: command not found" in done.stderr


def test_a_stage_does_not_guess_how_many_ranks_a_node_has(slurm):
    done, calls = stage(slurm, 0, SLURM_NTASKS_PER_NODE="")
    assert done.returncode == 2 and not calls and "bash launch/submit.sh" in done.stderr


def rank(tmp_path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """launch/env/rank.sh with a Python that prints the places of caches."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "env" / "pyvenv.cfg").touch()
    python.write_text(
        '#!/usr/bin/env bash\necho "$0 $* $TRITON_CACHE_DIR $TORCHINDUCTOR_CACHE_DIR $TORCH_EXTENSIONS_DIR"\n'
    )
    python.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON", "TORCH", "IMGLISH"))}
    place = {"PYTHON": str(python), "TMPDIR": str(tmp_path / "tmp"), "IMGLISH_TAG": "abc"}
    line = ["bash", str(ROOT / "launch" / "env" / "rank.sh"), *words]
    return subprocess.run(line, env=kept | place | environment, capture_output=True, text=True, timeout=20)


def test_what_a_rank_compiles_stays_on_its_node(tmp_path):
    own = tmp_path / "tmp" / f"imglish-{os.getuid()}"
    said = rank(tmp_path, "-m", "x").stdout.split()
    assert said[1:] == ["-m", "x", f"{own}/triton", f"{own}/inductor", f"{own}/extensions-abc"]
    assert own.stat().st_mode & 0o777 == 0o700
    assert rank(tmp_path, TRITON_CACHE_DIR="/mine").stdout.split()[1] == "/mine"


def test_what_lies_at_the_caches_place_and_is_not_ours_is_not_used(tmp_path):
    own, theirs = tmp_path / "tmp" / f"imglish-{os.getuid()}", tmp_path / "theirs"
    own.parent.mkdir()
    theirs.mkdir()
    own.symlink_to(theirs)
    done = rank(tmp_path, "-m", "x")
    assert done.returncode == 0 and str(own) not in done.stdout and "is not ours" in done.stderr


def test_ranks_start_from_the_nodes_copy_of_the_environment(tmp_path):
    local = {"IMGLISH_LOCAL": str(tmp_path / "shm")}
    copy = tmp_path / "shm" / f"imglish-{os.getuid()}" / "env-abc"
    assert rank(tmp_path, **local).stdout.startswith(f"{tmp_path}/env/bin/python")
    assert rank(tmp_path, "--copy", **local).returncode == 0 and (copy / "pyvenv.cfg").exists()
    assert rank(tmp_path, **local).stdout.startswith(f"{copy}/bin/python")
    (copy / "mark").touch()
    rank(tmp_path, "--copy", **local)
    assert (copy / "mark").exists(), "it was copied twice"
    assert rank(tmp_path, **local | {"IMGLISH_TAG": "new"}).stdout.startswith(f"{tmp_path}/env/bin/python")


@pytest.mark.parametrize(
    ("gpu", "given", "want"),
    [
        (True, {}, "expandable_segments:True 1048576"),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native", "MALLOC_MMAP_THRESHOLD_": "7"}, "backend:native 7"),
        (False, {}, "unset unset"),
    ],
)
def test_memory_settings_are_for_gpus_and_the_users_own_stay(tmp_path, gpu, given, want):
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{'echo GPU 0: one' if gpu else 'exit 9'}\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "MALLOC_MMAP_THRESHOLD_")
    environment = {name: value for name, value in os.environ.items() if name not in names} | given
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "IMGLISH_PYTHON": sys.executable}
    line = 'source launch/env/setup.sh; echo "${PYTORCH_ALLOC_CONF:-unset} ${MALLOC_MMAP_THRESHOLD_:-unset}"'
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=20)
    assert done.stdout.strip() == want, done
