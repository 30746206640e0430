from __future__ import annotations

import json

import pytest

from benchmarks import checkpoint_stall
from tests.distributed import run_ranks
from tests.small_run import ROOT
from tests.toys import refused


@pytest.mark.slow
def test_both_ways_of_saving_are_timed_on_real_steps(tmp_path, capsys):
    out = tmp_path / "stall.json"
    sizes = {"dim": 16, "depth": 1, "heads": 2, "ffn_dim": 32, "fusion_layers": 1}
    line = [
        "--recipe",
        "tiny",
        "--stage",
        "fusion",
        "--ds",
        str(ROOT / "ds_configs" / "zero1.json"),
        "--work",
        tmp_path,
    ]
    for key, value in {**{f"model.{name}": size for name, size in sizes.items()}, "loading.workers": 0}.items():
        line += ["--set", f"{key}={value}"]
    assert "--rounds=0" in refused(capsys, checkpoint_stall.main, *line, "--rounds", 0)
    # In a process of its own: a run's process group lasts as long as its process.
    line += ["--rounds", 1, "--steps", 1, "--out", out]
    assert run_ranks(checkpoint_stall.main, 1, [*map(str, line)]) == [0]
    figures = json.loads(out.read_text())
    assert figures["step_s"] > 0 and figures["parameters"] > 0 and figures["checkpoint_gib"] >= 0
    assert figures["plain"]["steps_meanwhile"] == 0 and figures["plain"]["stall_s"] > 0
    assert figures["background"]["written_in_s"] >= figures["background"]["stall_s"] > 0
    assert [path for path in tmp_path.iterdir() if path != out] == [], "its checkpoints are gone"
