"""benchmarks.shared_pictures: both ways take the same step; how long they take is not tested."""

from __future__ import annotations

import json

from benchmarks import shared_pictures


def test_it_compares_steps_of_one_loss(tmp_path):
    out = tmp_path / "figures.json"
    assert shared_pictures.main(["--rounds", "1", "--recipes", "tiny_albef", "--out", str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["largest_difference_of_losses"] < 1e-5 and row["times_as_fast"] > 0
