from __future__ import annotations

import json

import pytest

from benchmarks import idle_threads
from tests.toys import refused

TINY = ["batch.images=4", "model.dim=32", "model.heads=2", "model.ffn_dim=64"]


@pytest.mark.slow
def test_every_way_is_measured_alone_and_beside_a_busy_process(tmp_path, monkeypatch):
    monkeypatch.setattr(idle_threads, "WAYS", {"one thread": idle_threads.WAYS["one thread"]})
    out = tmp_path / "out.json"
    line = ["--rounds", "1", "--steps", "2", "--out", str(out), *(f"--set={setting}" for setting in TINY)]
    assert idle_threads.main(line) == 0
    speeds = json.loads(out.read_text())["samples_per_s"]
    assert set(speeds) == {"alone", "beside a busy process"}
    assert all(own["one thread"] > 0 for own in speeds.values())


@pytest.mark.parametrize(("words", "said"), [(("--rounds", "0"), "--rounds 0"), (("--steps", "0"), "--steps 0")])
def test_what_it_refuses(words, said, capsys):
    assert said in refused(capsys, idle_threads.main, *words)
