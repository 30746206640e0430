"""launch/codes.sbatch with stand-ins for SLURM's commands: every rank encodes, and no shard is lost when time is up."""

from __future__ import annotations

import pytest

from tests.test_launch import slurm  # noqa: F401

WORDS = ["data/pairs", "--tokenizer", "runs/my base/tokenizer", "--crops", "4"]


@pytest.fixture
def job(slurm):  # noqa: F811
    def run(code: int, **more: str):
        place = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
        place |= {"SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "12", "STATE": "RUNNING", "CODE": str(code)}
        return slurm("launch/codes.sbatch", *WORDS, **place, **more)

    return run


def test_every_rank_encodes_and_none_ends_another(job):
    done, calls = job(0)
    (srun,) = [call for call in calls if call.startswith("srun ")]
    assert done.returncode == 0 and "--wait=0" in srun and "--kill-on-bad-exit=0" in srun, done.stderr
    assert srun.endswith("launch/env/rank.sh -m pretrain.encode_images " + " ".join(WORDS))
    assert not any("requeue" in call for call in calls)


def test_a_mistake_ends_the_job_with_its_code(job):
    done, calls = job(2)
    assert done.returncode == 2 and not any("requeue" in call for call in calls)


def test_before_its_time_limit_it_puts_itself_back_into_the_queue(job):
    done, calls = job(0, SIGNAL="USR1")
    assert "srun got TERM" in calls and "requeue 41" in calls and done.returncode == 143, done.stderr
