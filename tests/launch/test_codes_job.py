"""launch/codes.sbatch with stand-ins for SLURM's commands: every rank encodes, and no shard is lost when time is up."""

from __future__ import annotations

import pytest

from pretrain.launch.codes import plan_codes
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


def test_a_directory_that_has_two_names_is_encoded_once(tmp_path, monkeypatch):
    """Whoever has pairs alone links images to them: two jobs' ranks would write one file."""
    (tmp_path / "pairs").mkdir()
    (tmp_path / "images").symlink_to("pairs")
    monkeypatch.setenv("DATA", str(tmp_path))
    settings, storing = plan_codes("beit3_base", [], tmp_path / "run", ["pretrain"], 4)
    assert len(settings["pretrain"]) == 4, "both kinds read them"
    assert storing.directories == storing.arguments[:1] == (str(tmp_path / "images"),)
