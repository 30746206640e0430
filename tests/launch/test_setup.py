"""launch/env/setup.sh: which torch goes into the environment, and what a job says that finds the wrong one. Python, pip
and nvidia-smi are stand-ins that write down how they are called."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.small_run import ROOT

SETUP = str(ROOT / "launch" / "env" / "setup.sh")
PYTHON = """
case "$*" in
    *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *is_available*) exit "${TORCH_SEES:-0}" ;;
    *"-m pip"*) echo "$@" >>"$CALLS"; [[ "$*" != *"$PIP_LACKS"* ]] ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """-> setup(script, environment): its outcome, and the calls of pip."""
    calls, env = tmp_path / "calls", tmp_path / "env"
    for name, body in (("python3.11", PYTHON), ("nvidia-smi", '[ -n "$CUDA" ] && echo "| CUDA Version: $CUDA |"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "IMGLISH_"))}
    kept |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(calls), "IMGLISH_ENV": str(env), "PIP_LACKS": "none"}

    def run(script: str = f"bash {SETUP}", cuda: str = "", **environment: str):
        calls.write_text("")
        line = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(
            line, env=kept | {"CUDA": cuda} | environment, capture_output=True, text=True, timeout=20, cwd=ROOT
        )
        return done, [call for call in calls.read_text().splitlines() if "torch==" in call or "uninstall" in call]

    return run


IN_JOB = {"script": f"source {SETUP}", "SLURM_JOB_ID": "7"}


def build(tmp_path: Path) -> str:
    return (tmp_path / "env" / ".imglish-stamp").read_text().splitlines()[1]


@pytest.mark.parametrize(
    ("cuda", "asked", "installs", "holds"),
    [
        ("", "", "install -q torch==2.13.0+cpu", "cpu"),
        ("13.0", "", "install -q torch==2.13.0", "cuda"),
        ("", "cuda", "install -q torch==2.13.0", "cuda"),  # a login node
        ("", "cu126", "install -q torch==2.13.0+cu126", "cu126"),
        ("13.0", "cpu", "install -q torch==2.13.0+cpu", "cpu"),
    ],
)
def test_the_build_of_torch_is_chosen_and_written_down(setup, tmp_path, cuda, asked, installs, holds):
    done, calls = setup(cuda=cuda, IMGLISH_TORCH=asked)
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if "install" in call.split()][-1].endswith(installs) and build(tmp_path) == holds
    assert setup(cuda=cuda, IMGLISH_TORCH=asked)[1] == [], "made once"
    assert setup()[1] == [], "any build runs where there is no GPU"


def test_a_build_that_is_asked_for_replaces_the_other(setup, tmp_path):
    setup()
    done, calls = setup(IMGLISH_TORCH="cu126")
    assert "uninstall" in calls[0] and build(tmp_path) == "cu126" and "installing cu126" in done.stderr
    setup(cuda="12.4")
    assert build(tmp_path) == "cu126", "a GPU that is here takes any build for GPUs"


def test_an_index_is_asked_where_pip_has_no_such_build(setup):
    done, calls = setup(IMGLISH_TORCH="cu129", PIP_LACKS="torch==2.13.0+cu129")
    assert calls[-1].split("--")[1] == "index-url https://download.pytorch.org/whl/cu129 "
    assert done.returncode == 2 and "pip finds no torch==2.13.0+cu129" in done.stderr


def test_a_build_that_does_not_exist_is_one_sentence(setup):
    done, calls = setup(IMGLISH_TORCH="gpu")
    assert done.returncode == 2 and not calls
    assert done.stderr == ("setup: IMGLISH_TORCH=gpu is no build of torch; use cpu, cuda, or an index such as cu126\n")


def test_an_argument_is_not_taken_for_a_build(setup):
    done, calls = setup(f"bash {SETUP} cuda")
    assert done.returncode == 2 and not calls
    assert "setup: cuda is an argument" in done.stderr and "IMGLISH_TORCH=cuda bash" in done.stderr


@pytest.mark.parametrize(
    ("made", "cuda", "asked", "says"),
    [
        (None, "13.0", "", "there is no environment in .*: IMGLISH_TORCH=cuda bash launch/env/setup.sh"),
        (
            "cpu",
            "13.0",
            "",
            "holds torch's build cpu, and cuda is wanted here; call on the login node: IMGLISH_TORCH=cuda",
        ),
        ("cuda", "12.4", "cu126", "holds torch's build cuda, and cu126 is wanted"),
        ("old", "13.0", "", "was made for another version of this checkout; .* IMGLISH_TORCH=cuda"),
    ],
)
def test_a_job_changes_no_environment_and_says_what_to_call_where(setup, tmp_path, made, cuda, asked, says):
    if made:
        setup(IMGLISH_TORCH="cpu" if made == "old" else made)
    if made == "old":
        (tmp_path / "env" / ".imglish-stamp").write_text("0\ncpu\n")
    done, calls = setup(cuda=cuda, IMGLISH_TORCH=asked, **IN_JOB)
    assert done.returncode == 2 and not calls
    assert re.search(says, done.stderr) and done.stderr.count("\n") == 1, done.stderr


def test_a_job_with_the_right_environment_goes_on(setup, tmp_path):
    setup(IMGLISH_TORCH="cuda")
    done, _ = setup(cuda="13.0", **IN_JOB | {"script": f"source {SETUP}; echo $PYTHON"})
    assert done.stdout == f"{tmp_path}/env/bin/python\n"


@pytest.mark.parametrize(
    ("cuda", "sees", "says"),
    [("12.4", "3", "IMGLISH_TORCH=cu126"), ("13.0", "3", "IMGLISH_TORCH=cuda"), ("12.4", "0", "")],
)
def test_a_driver_that_is_too_old_for_torch_is_said(setup, cuda, sees, says):
    setup(IMGLISH_TORCH="cuda")
    done, _ = setup(cuda=cuda, TORCH_SEES=sees, **IN_JOB | {"script": f"source {SETUP}; check_torch; echo fine"})
    assert (done.returncode, done.stdout) == ((2, "") if says else (0, "fine\n")) and says in done.stderr
    assert not says or f"whose driver is of CUDA {cuda.split('.')[0]}" in done.stderr


def test_the_way_out_agrees_with_the_clusters_file(setup, tmp_path):
    setup(IMGLISH_TORCH="cuda")
    (tmp_path / "my.env").write_text("export IMGLISH_TORCH=cuda\n")
    job = IN_JOB | {"script": f"source {SETUP}; check_torch", "IMGLISH_CLUSTER": str(tmp_path / "my.env")}
    done, _ = setup(cuda="12.4", TORCH_SEES="3", **job)
    assert (
        f"set IMGLISH_TORCH=cu126 in {tmp_path}/my.env, and call on the login node: IMGLISH_TORCH=cu126" in done.stderr
    )
