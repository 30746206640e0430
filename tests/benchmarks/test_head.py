from __future__ import annotations

import json

from benchmarks import head
from tests.toys import refused


def test_both_ways_are_measured_and_agree(tmp_path, capsys):
    out = tmp_path / "head.json"
    line = ["--rows", "40", "--dim", "8", "--classes", "30", "--chunk", "300", "--repeats", "1", "--out", str(out)]
    assert head.main(line) == 0
    figures = json.loads(out.read_text())
    assert max(figures["difference"].values()) < 1e-6 and figures["whole"]["seconds"] > 0
    assert "--rows=0" in refused(capsys, head.main, "--rows", 0)
