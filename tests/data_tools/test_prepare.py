"""launch/prepare.sbatch: each task of the array downloads its slice, or does its part of another tool's work, and a
wrong number of slices is an error."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from data_tools.fetch.run_img2dataset import ROOT
from pretrain.launch.checks import DIVIDED

ARGUMENTS = ("--list", "a b.parquet", "--preset", "laion", "--out", "D")


@pytest.fixture
def prepare(tmp_path):
    """-> run(arguments, environment): the script's outcome, and the arguments that Python got."""
    python = tmp_path / "python"
    python.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "$@" >{tmp_path}/words\n')
    python.chmod(0o755)
    base = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SLICES", "SBATCH_"))}
    base |= {"SLURM_JOB_ID": "7", "IMGLISH_PYTHON": str(python), "IMGLISH_DOWNLOAD_PYTHON": str(python)}

    def run(*words: str, cwd: Path = ROOT, **environment: str):
        script = ROOT / "launch" / "prepare.sbatch"
        line = ["bash", str(script), *words]
        done = subprocess.run(line, cwd=cwd, env=base | environment, capture_output=True, text=True, timeout=20)
        called = tmp_path / "words"
        return done, called.read_text().splitlines() if called.exists() else None

    return run


def array(task: int, tasks: int, highest: int | None = None) -> dict[str, str]:
    highest = tasks - 1 if highest is None else highest
    words = {"TASK_ID": task, "TASK_COUNT": tasks, "TASK_MAX": highest, "TASK_MIN": 0}
    return {f"SLURM_ARRAY_{name}": str(value) for name, value in words.items()} | {"SLURM_CPUS_PER_TASK": "16"}


def test_a_task_takes_the_slice_of_its_number(prepare):
    done, words = prepare(*ARGUMENTS, **array(3, 16))
    assert done.returncode == 0, done.stderr
    assert words == ["-m", "data_tools.download", "--workers", "16", "--slice", "3/16", *ARGUMENTS]


def test_restarted_tasks_need_the_number_of_slices(prepare):
    done, words = prepare("--out", "D", **array(7, 2, highest=7))
    assert done.returncode == 2 and words is None and "SLICES=N bash launch/submit.sh" in done.stderr
    done, words = prepare("--out", "D", SLICES="16", **array(7, 2, highest=7))
    assert done.returncode == 0 and "7/16" in words


def test_a_job_without_array_may_only_merge(prepare):
    done, words = prepare("--out", "D")
    assert done.returncode == 2 and words is None and "--array" in done.stderr
    done, words = prepare("--merge", "--out", "D")
    assert done.returncode == 0 and words == ["-m", "data_tools.download", "--workers", "1", "--merge", "--out", "D"]


def test_it_must_run_in_the_checkout(prepare, tmp_path):
    done, words = prepare("--out", "D", cwd=tmp_path, **array(0, 1))
    assert done.returncode == 2 and words is None and "not the checkout" in done.stderr


@pytest.mark.parametrize("tool", DIVIDED)
def test_a_task_does_its_part_of_another_tools_work(prepare, tool, tmp_path):
    # The download's environment is not asked for.
    done, words = prepare(tool, "data/web", "--out", "D", IMGLISH_DOWNLOAD_PYTHON=str(tmp_path / "no"), **array(3, 8))
    assert done.returncode == 0, done.stderr
    assert words == ["-m", tool, "--workers", "16", "--part", "3/8", "data/web", "--out", "D"]
    done, words = prepare(tool, "data/web", SLICES="8", **array(7, 2, highest=7))
    assert done.returncode == 0 and words[4:6] == ["--part", "7/8"]
    done, words = prepare(tool, "data/web", SLURM_CPUS_PER_TASK="4")
    assert done.returncode == 0 and words == ["-m", tool, "--workers", "4", "data/web"]


def test_a_tool_that_cannot_be_divided_runs_in_one_task(prepare):
    done, words = prepare("data_tools.filter_shards", "data/web")
    assert done.returncode == 0 and words == ["-m", "data_tools.filter_shards", "data/web"]
    done, words = prepare("data_tools.dedup", "data/web", **array(0, 4))
    assert done.returncode == 2 and "submit it without --array" in done.stderr
    done, words = prepare("data_tools.download", *ARGUMENTS, **array(3, 16))
    assert done.returncode == 0 and words[1] == "data_tools.download" and "--slice" in words


def test_the_tools_that_are_divided_take_a_part():
    """All of them, and no other one."""
    files = [path for room in ("data_tools", "pretrain") for path in (ROOT / room).glob("*.py")]
    ways = "part_of(args.part)", "portions import Folder"  # its own, and what embed and caption share
    takes = {f"{path.parent.name}.{path.stem}" for path in files if any(way in path.read_text() for way in ways)}
    assert takes - {"pretrain.portions"} == set(DIVIDED)
