"""launch/quickstart.sh itself, with two steps a stage: that its pieces fit, not what they reach."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_hour.quickstart import reached
from pretrain.recipes import tiny

ROOT = Path(__file__).parents[1]


def quickstart(run: Path) -> subprocess.CompletedProcess:
    mine = {"IMGLISH_PYTHON": sys.executable, "QUICKSTART_DIR": str(run), "OMP_NUM_THREADS": "1"}
    line = ["bash", "launch/quickstart.sh", "--set", "steps=2"]
    return subprocess.run(line, cwd=ROOT, env=os.environ | mine, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_quickstart_runs_to_its_table_and_a_second_call_has_nothing_to_do(tmp_path):
    first = quickstart(tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    for row in ("retrieval ", "scratch: same budget, no pretraining", "fusion: words in pairs", "chance of 256"):
        assert row in first.stdout, row
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png" in page and "scratch" in page
    assert all(reached(tmp_path)[stage]["step"] == 2 for stage in tiny.RECIPE.stages), "as benchmarks.gpu_hour reads it"
    again = quickstart(tmp_path)
    assert again.returncode == 0
    assert again.stderr.count("nothing to do") == 14, "seven stages trained before and evaluated before"
