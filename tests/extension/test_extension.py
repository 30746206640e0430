"""Models, objectives, sources and evaluations from files outside pretrain/: a Hugging Face dual tower, matching with
hard negatives from the first pass, question answering. Each trains on two ranks, resumes, evaluates, is reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_tools.train_text_tokenizer import train
from pretrain.checkpoint.weights import weights_digest
from pretrain.report import __main__ as report
from tests.small_run import WORDS, Ranks, command, evaluate
from tests.toys import pair_sample, write_source

RECIPE = Path(__file__).with_name("recipe.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("extension")
    words = WORDS.split()
    captions = [" ".join(words[(i * k) % len(words)] for k in (1, 2, 3, 5)) for i in range(1, 31)]
    pairs = [[pair_sample(f"{s}{i}", 10 * s + i, captions[10 * s + i]) for i in range(10)] for s in range(3)]
    write_source(place / "pairs", pairs)
    for number, sample in enumerate(sample for shard in pairs for sample in shard):
        sample["json"] = json.dumps({"label": number % 4, "answer": f"answer {number % 4}"}).encode()
    write_source(place / "questions", pairs)
    train([str(place / "pairs")], place / "text.model", 48, model_type="bpe")
    return place


def run_stage(data: Path, run: Path, stage: str) -> None:
    run.mkdir(exist_ok=True)
    line = command(data, run, stage, ds="zero1.json")
    line[line.index("--recipe") + 1] = str(RECIPE)
    log = run / f"{stage}.log"
    assert Ranks(line, data, 2, log).wait(120) == [0, 0], log.read_text()


def scores(data: Path, run: Path, stage: str) -> dict:
    done = evaluate(data, run, stage, RECIPE)
    assert done.returncode == 0, done.stderr
    return json.loads((run / stage / "eval.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_parts_from_outside_train_resume_evaluate_and_are_reported(data, tmp_path, capsys):
    run = tmp_path / "run"
    expected = {
        "towers": {"loss", "accuracy/image_to_text"},
        "matching": {"loss/contrastive", "loss/matching", "accuracy/matching"},
        "answers": {"loss", "accuracy/answers"},
    }
    for stage, names in expected.items():
        run_stage(data, run, stage)
        lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, 11))
        assert names <= set(lines[0])
        assert lines[-1]["loss"] < lines[0]["loss"]
        # As if it had been killed after step 5: it goes on from there and ends with the same bits.
        first = weights_digest(run / stage)
        (run / stage / "weights.safetensors").unlink()
        shutil.rmtree(run / stage / "checkpoints/step_00000010")
        run_stage(data, run, stage)
        assert "resumed from" in (run / f"{stage}.log").read_text()
        assert weights_digest(run / stage) == first
    recall, matched, answers = (scores(data, run, stage) for stage in expected)
    assert recall["retrieval/candidates"] == 30 and 0 <= recall["retrieval/image_to_text/R@1"] <= 100
    assert 0 < matched["matching/percent"] <= 100 and "retrieval/text_to_image/R@5" in matched
    assert 25 < answers["vqa/accuracy"] <= 100
    assert report.main(["--run-dir", str(run)]) == 0
    table = capsys.readouterr().out
    assert "answers: vqa/accuracy" in table and "matching: matching/percent" in table and "towers " in table
    assert "vqa/accuracy" in (run / "report.html").read_text()
