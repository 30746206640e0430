from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from benchmarks import zoo
from benchmarks.zoo_picture import Mark, picture
from tests.toys import refused


@pytest.mark.parametrize("name", zoo.MEMBERS)
def test_every_member_sees_as_many_samples_and_has_its_scores(name, monkeypatch):
    monkeypatch.setenv("DATA", "nowhere")
    recipe, stage = zoo.MEMBERS[name].load(6400)
    each = {count * stage.steps for count in stage.batch.counts().values() if count}
    assert each == {6400} and stage.init_from is None, "every objective sees as many pairs"
    trained = {objective.name for objective in stage.objectives}
    evaluated = {type(evaluation).__name__ for evaluation in stage.evals}
    wanted = {"contrastive": "Retrieval", "matching": "MatchingAccuracy", "masked": "MaskedAccuracy",
              "captioning": "CaptionScore"}  # fmt: skip
    assert evaluated == {wanted[each] for each in trained}
    assert zoo.parameters(recipe, stage) > 500_000 and zoo.flops(recipe, stage) > 1e11


def write_run(directory, **scores: float):
    directory.mkdir()
    lines = [{"step": step, "samples_per_s": 100.0 + step, "memory_gib": 0.5} for step in range(1, 8)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "eval.json").write_text(json.dumps(scores))
    return directory


def test_the_table_says_what_the_runs_left(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA", "nowhere")
    clip = write_run(tmp_path / "clip", **{"retrieval/image_to_text/R@1": 40.0, "retrieval/text_to_image/R@1": 50.0})
    vilt = write_run(tmp_path / "vilt", **{
        "matching/accuracy": 80.0, "matching/baseline": 50.0, "matching/choice": 90.0,
        "masked/pair_text/accuracy": 60.0, "masked/pair_text/baseline": 18.0,
    })  # fmt: skip
    rows = [zoo.row(name, zoo.MEMBERS[name], 6400, place) for name, place in (("CLIP", clip), ("ViLT", vilt))]
    assert rows[0]["samples_per_s"] == 105.5 and rows[0]["samples"] == 6400
    said = zoo.table(rows).splitlines()
    assert "masked words (of 18.0)" in said[0]
    assert said[2].endswith("| 40.0 / 50.0 | - | - | - | - |")
    assert said[3].endswith("| - / - | 80.0 | 90.0 | 60.0 | - |")
    assert zoo.marks(rows) == [Mark("CLIP", rows[0]["TFLOP"], 45.0)]


def test_the_picture_has_every_member_in_it():
    drawn = ElementTree.fromstring(picture([Mark("A & B", 4.0, 20.0), Mark("C", 12.0, 80.0)]))
    points = [(float(each.get("cx")), float(each.get("cy"))) for each in drawn.iter() if each.tag.endswith("circle")]
    assert points[0][0] < points[1][0] and points[0][1] > points[1][1]
    assert {"A & B 20", "C 80"} <= {each.text for each in drawn.iter() if each.tag.endswith("text")}


def test_names_of_near_points_stand_below_each_other():
    drawn = ElementTree.fromstring(picture([Mark(name, 4.0, 50.0) for name in "ABC"] + [Mark("far", 40.0, 50.0)]))
    lines = {each.text: float(each.get("y")) for each in drawn.iter() if each.tag.endswith("text")}
    a, b, c = (lines[f"{name} 50"] for name in "ABC")
    assert b - a >= 14 and c - b >= 14 and lines["far 50"] == a


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--samples", "63"), "less than ten steps of 64; use 640 or more"),
        (("--members", "GPT"), "'GPT' is not known; use"),
    ],
)
def test_what_it_refuses(words, said, tmp_path, capsys):
    assert said in refused(capsys, zoo.main, "--run-dir", tmp_path / "zoo", *words)
    assert not (tmp_path / "zoo").exists()
