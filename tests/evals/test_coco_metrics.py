"""Metrics of pycocoevalcap: what comes of them, and what is said where they cannot be had. The package is no
dependency of the tests; a stand-in shows the way to it."""

from __future__ import annotations

import importlib
import logging
import sys
from pathlib import Path

import pytest

from pretrain.evals.captions import CaptionScore, ReferenceShards
from pretrain.evals.coco_metrics import METRICS, MODELS, coco_metrics
from pretrain.run.trained import said

CAPTIONS, REFERENCES = ["A red bus!", "two dogs"], [["a bus", "Red bus."], ["dogs run"]]
SCORER = """
class {name}:
    def __init__(self, *sizes):
        pass
    def compute_score(self, given, own, **options):
        assert given == {{0: ["a bus", "red bus"], 1: ["dogs run"]}} and own == {{0: ["a red bus"], 1: ["two dogs"]}}
        {score}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Path:
    """A pycocoevalcap whose scorers give fixed numbers, and a java."""
    scores = {"Bleu": "return [0.4, 0.3, 0.2, 0.1], []", "Rouge": "return 0.5, []", "Meteor": "return 0.25, []"}
    for name, score in (scores | {"Spice": "return 0.2, []"}).items():
        folder = tmp_path / "packages/pycocoevalcap" / name.lower()
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
        (folder / f"{name.lower()}.py").write_text(SCORER.format(name=name, score=score))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    java = tmp_path / "bin/java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(java.parent))
    _forget()
    yield tmp_path / "packages/pycocoevalcap"
    _forget()


def _forget() -> None:
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.startswith("pycocoevalcap")]:
        del sys.modules[name]


def test_what_the_package_says_is_given_in_percent(package):
    for name in MODELS:
        (package / "spice" / name).parent.mkdir(exist_ok=True)
        (package / "spice" / name).touch()
    assert coco_metrics(METRICS, CAPTIONS, REFERENCES) == pytest.approx(
        {"captions/BLEU-1": 40, "captions/BLEU-2": 30, "captions/BLEU-3": 20, "captions/BLEU-4": 10,
         "captions/ROUGE-L": 50, "captions/METEOR": 25, "captions/SPICE": 20}
    )  # fmt: skip


def test_what_is_missing_is_said_once_and_is_no_number(package, monkeypatch, caplog):
    values = coco_metrics(["SPICE"], CAPTIONS, REFERENCES)
    assert values["captions/SPICE"] is None and "stanford-corenlp-3.6.0.jar" in values["captions/SPICE/missing"]
    monkeypatch.setenv("PATH", "")
    values = coco_metrics(["ROUGE", "METEOR"], CAPTIONS, REFERENCES)
    assert values["captions/ROUGE-L"] == 50 and values["captions/METEOR"] is None
    assert "there is no java on PATH; install" in values["captions/METEOR/missing"]
    with caplog.at_level(logging.WARNING, "pretrain"):
        assert said("captions", values) == {"captions/ROUGE-L": 50.0}
    assert [record.getMessage() for record in caplog.records] == [
        f"captions: captions/METEOR is missing: {values['captions/METEOR/missing']}"
    ]


def test_a_program_that_fails_is_a_missing_value(package):
    (package / "meteor/meteor.py").write_text(SCORER.format(name="Meteor", score="float('')"))
    assert (
        "METEOR and it failed (could not convert"
        in coco_metrics(["METEOR"], CAPTIONS, REFERENCES)["captions/METEOR/missing"]
    )


def test_without_the_package_the_way_out_is_its_extra(monkeypatch):
    _forget()
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert "pip install '.[captions]'" in coco_metrics(["BLEU"], CAPTIONS, REFERENCES)["captions/BLEU/missing"]


def test_other_names_are_one_sentence():
    with pytest.raises(ValueError, match=r"more=.'BERTScore',. is unknown; use some of BLEU, ROUGE, METEOR, SPICE"):
        CaptionScore(ReferenceShards("x"), more=("BERTScore",))
