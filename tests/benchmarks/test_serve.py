"""The load test notices wrong answers: it compares with what single calls answer."""

from __future__ import annotations

import copy

import pretrain
from benchmarks.serve import mixed_load, speed
from benchmarks.serve_clients.answers import Known, make_weights
from tests.serving.conftest import LIMITS, WRITING, serving
from tests.toys import needs

needs("fastapi")
needs("uvicorn")


def test_right_answers_are_right_and_others_are_wrong(tmp_path):
    model = pretrain.load(make_weights(tmp_path / "stage"))
    known = Known(model, WRITING)
    with serving(model, LIMITS, batch=16) as running:
        mixed = mixed_load(running.port, known, requests=20, hostile=0.0, clients=6)
        assert mixed["wrong"] == [] and mixed["largest_difference"] <= 1e-6 and mixed["hostile"] == 0
        assert speed(running.port, known, clients=2, seconds=0.05)[0] > 0
        moved, written = copy.copy(known), copy.copy(known)
        moved.images = known.images + 1e-5
        written.captions = ["another"] * len(known.captions)
        wrong = mixed_load(running.port, moved, 10, 0.0, 2)["wrong"]
        assert {line.split(":")[0] for line in wrong} == {"/embed 200", "/similarity 200"}
        assert mixed_load(running.port, written, 10, 0.0, 2)["wrong"] == ["/caption 200: inf"] * 2
