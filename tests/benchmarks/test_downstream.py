"""benchmarks.downstream: its sets are whole and its recipe fits; figures take minutes and are not made here."""

from __future__ import annotations

import json

from benchmarks import downstream
from pretrain.data.labelled import read_vocabulary
from pretrain.recipes import find_recipe
from tests.toys import read_all, refused


def test_its_sets_go_the_way_of_public_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downstream, "PER_CLASS", {"train": 1, "test": 1})
    monkeypatch.setattr(downstream, "SCENES", {"train": 200, "test": 3})
    for _ in range(2):  # it goes on where it was
        downstream.write_tasks(tmp_path)
    tasks = tmp_path / "tasks"
    assert (
        len(json.loads((tasks / "classes" / "labels.json").read_text())) == 40 == len(read_all(tasks / "classes/test"))
    )
    assert len(read_all(tasks / "questions/train")) == 200 == len(read_all(tasks / "hypotheses/train"))
    assert len(read_all(tasks / "sentences/train")) == 200 == len(read_all(tasks / "shapes/train"))
    assert len(read_all(tasks / "hypotheses/test")) == 3
    assert json.loads((tasks / "hypotheses/train/labels.json").read_text())[1] == "neutral"
    assert all(
        {"png", "jpe"} <= set(sample) or {"jpg", "jpe"} <= set(sample) for sample in read_all(tasks / "sentences/test")
    )
    recipe = find_recipe(str(downstream.RECIPE))
    assert set(recipe.stages) == {
        name + end for name in downstream.METRICS for end in (("",) if name in downstream.GOES_ON else ("", "_scratch"))
    }
    assert (
        len(read_vocabulary(str(tasks / "questions/answers.json"))) == recipe.stages["questions"].objectives[0].answers
    )
    line = ["--quickstart", tmp_path, "--work", tmp_path / "w"]
    assert "has no finished retrieval" in refused(capsys, downstream.main, *line)
