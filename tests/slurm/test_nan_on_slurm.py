"""NaN in the loss of a run on a real SLURM of two nodes: it goes back past the bad batch, and the stage is finished."""

from __future__ import annotations

import subprocess

import pytest

from pretrain.metrics import read_metrics
from pretrain.rollbacks import read_rollbacks
from tests.slurm.one_host import wait_for
from tests.slurm.test_real_slurm import ENDS_S, cluster, jobs_of, logs  # noqa: F401, a fixture
from tests.small_run import ROOT
from tests.test_rollback import BAD, BATCHES, keys_of, trace

pytestmark = pytest.mark.slow
SPOILT = """
from dataclasses import dataclass, replace

@dataclass(frozen=True)
class Spoilt(MaskedData):
    def build(self, *parts, **more):
        head = super().build(*parts, **more)
        forward = head.forward
        def spoilt(encoded, batch, *rest):
            by = float("nan") if set({keys}).issuperset(batch.keys) else 1.0
            return {{name: value * by for name, value in forward(encoded, batch, *rest).items()}}
        head.forward = spoilt
        return head

STAGE = replace(RECIPE.stages["language"], objectives=(Spoilt(image_codes=16),), init_from=None, steps=8)
RECIPE = replace(RECIPE, stages={{"language": STAGE}}, save_every=2, keep=9)
"""


def test_a_run_with_nan_goes_back_past_the_bad_batch_and_finishes(cluster, data, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("DATA", str(data))
    (bad,) = keys_of(data, [BAD])
    recipe = tmp_path / "recipe.py"
    recipe.write_text((data / "recipe.py").read_text() + SPOILT.format(keys=repr(bad)))
    line = ["bash", "launch/submit.sh", "launch/stage.sbatch", "--recipe", str(recipe), "--stage", "language"]
    line += ["--ds", "ds_configs/zero1.json", "--run-dir", str(tmp_path / "run")]
    for rule in ("most=1", "before=1", "after=1"):
        line += ["--set", f"rollback.{rule}"]
    said = ""
    for _ in range(2):  # a job that does not start its ranks again itself is submitted once more
        done = subprocess.run(line, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=100)
        (job,) = jobs_of(done)
        ended = wait_for(job, cluster, ENDS_S)
        own, ranks = logs(tmp_path / "run", job)
        said += own + "".join(path.read_text() for path in ranks)
        if ended == "COMPLETED":
            break
    assert ended == "COMPLETED", said
    assert said.count("rank 0 of 2: step 6: the gradient norm is") >= 1
    stage = tmp_path / "run" / "language"
    (rollback,) = read_rollbacks(stage)
    assert (rollback.step, rollback.to, rollback.first, rollback.last, rollback.done) == (6, 4, 5, 7, True)
    assert [line["step"] for line in read_metrics(stage / "metrics.jsonl")] == list(range(1, 9))
    assert [sorted(keys) for keys in trace(stage).values()] == [sorted(keys) for keys in keys_of(data, BATCHES)]
