"""A chain with `codes` on a real SLURM of two nodes: a rank of each stores its shards' codes, and the next stage reads
what one process alone would have made."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from tests.slurm.one_host import wait_for
from tests.slurm.test_real_slurm import ENDS_S, cluster, jobs_of, logs  # noqa: F401, a fixture
from tests.small_run import ROOT, check_weights, train_stage

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_codes_are_stored_between_the_tokenizer_and_the_stage_that_reads_them(cluster, data, tmp_path):  # noqa: F811
    own, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, own, ignore=shutil.ignore_patterns("start"))  # codes lie beside their shards
    # Its tokenizer is finished, which saves a third of the time: that a job waits for a stage's job is seen of `vision`
    # here, and that codes are planned before their tokenizer exists in tests/launch/test_launch_command.py.
    shutil.copytree(data / "start", run)
    line = ["bash", "launch/chain.sh", "tokenizer codes:2 vision", "--recipe", str(own / "recipe.py")]
    line += ["--ds", "ds_configs/zero1.json", "--run-dir", str(run)]

    def chain() -> subprocess.CompletedProcess[str]:
        mine = cluster | {"DATA": str(own)}
        return subprocess.run(line, cwd=ROOT, env=mine, capture_output=True, text=True, timeout=100)

    codes, _ = jobs = jobs_of(chain())
    assert [wait_for(job, cluster, ENDS_S) for job in jobs] == ["COMPLETED"] * 2, [logs(run, job) for job in jobs]
    shards = sorted(path.name for path in (own / "images").glob("*.tar"))
    assert sorted(path.name for path in (own / "images").glob("*.codes")) == [f"{name[:-4]}.codes" for name in shards]
    said, ranks = logs(run, codes)
    assert "on node[1-2]: the ranks write to" in said
    assert [path.name for path in ranks][-2:] == ["rank00000.log", "rank00001.log"]
    stored = json.loads((own / "images" / "codes.json").read_text())
    assert list(stored["shards"]) == shards and stored["coding"]["crops"] == 2
    noted = json.loads((run / "vision" / "recipe.json").read_text())["identity"]["mix"]["images"]
    assert (noted["crops"], noted["codes"]) == (2, "codes")

    # One process whose tokenizer makes them in each step sees the same looks and so the same codes.
    look = ("mix.images.crops=2", f"visual_tokenizer={run / 'tokenizer' / 'weights.safetensors'}")
    alone = train_stage(own, tmp_path / "alone", "vision", *look)
    assert alone.returncode == 0, alone.stderr
    check_weights(run / "vision", tmp_path / "alone" / "vision", most=1e-5)
    again = chain()
    assert (again.returncode, again.stdout) == (0, "codes: stored\ntokenizer: finished\nvision: finished\n")
