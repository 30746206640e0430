"""The report: whole, partial, running and hostile run directories become one page that stands alone."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from PIL import Image

from pretrain.report.__main__ import format_table, main, write_report
from pretrain.report.charts import Chart, Curve, downsampled, drawing, histogram, nice_ticks, number, smoothed
from pretrain.report.page import _tiles
from pretrain.report.rows import load_run, masked_rows, retrieval_rows
from pretrain.visible import visible
from tests.report.reader import EVIL, SHOWN, Reader, check_inert


def write_stage(run: Path, name: str, *, steps: int = 60, lines: int | None = None, **files: dict) -> Path:
    directory = run / name
    (directory / "samples").mkdir(parents=True)
    recipe = {"name": "tiny", "stages": {n: {"steps": steps} for n in ("vision", "fusion", "retrieval")}}
    recipe["stages"][name] = {"steps": steps}
    (directory / "recipe.json").write_text(json.dumps(recipe))
    with open(directory / "metrics.jsonl", "w") as file:
        for step in range(1, (steps if lines is None else lines) + 1):
            line = {"step": step, "loss": 9 / step, "lr": 1e-3, "samples_per_s": 10.0, "data_wait": 0.1, "mfu": None}
            line |= {"samples_seen": 20 * step, "accuracy/image": step / 100, "loss/image": 1.0, "loss/text": 2.0}
            file.write(json.dumps(line) + "\n")
    for stem, content in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(content))
    return directory


def recalls(value: float) -> dict[str, float]:
    keys = [f"retrieval/{d}/R@{k}" for d in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    return dict.fromkeys(keys, value) | {"retrieval/candidates": 256.0, "step": 60, "weights": "abc"}


@pytest.fixture
def run(tmp_path) -> Path:
    write_stage(tmp_path, "vision", eval={"masked/image/accuracy": 31.5, "masked/image/baseline": 12.25})
    fusion = write_stage(tmp_path, "fusion", eval={"masked/pair_text/accuracy": 77.5, "zero_shot/accuracy": 42.5})
    Image.new("RGB", (8, 8), "red").save(fusion / "samples" / "a.png")
    masked = {"input": "samples/a.png", "masked": "samples/gone.png", "predicted": None, "caption": EVIL}
    masked |= {"masked_caption": f"a [red] circle {EVIL}", "predicted_caption": f"blue {EVIL}"}
    (fusion / "samples.json").write_text(json.dumps({"masked": [masked], "retrieval": []}))
    write_stage(tmp_path, "retrieval", eval=recalls(71.25))
    write_stage(tmp_path, "scratch", eval=recalls(20.5))
    return tmp_path


def read(run: Path) -> Reader:
    return Reader(write_report(run).read_text(encoding="utf-8"))


def test_page_has_every_stage_table_and_chart(run):
    page = read(run)
    assert [s.name for s in load_run(run)] == ["vision", "fusion", "retrieval", "scratch"]
    for wanted in ("71.2", "20.5", "31.5", "12.2", "77.5", "42.5", "same budget, no pretraining", "256 candidates"):
        assert wanted in page.text, wanted
    charts = [attributes for tag, attributes in page.tags if tag == "figure"]
    for title in ("Loss", "Accuracy", "Learning rate", "Throughput", "Waiting for data"):
        assert sum(chart["aria-label"].startswith(title) for chart in charts) == 4, title
    assert not any("utilisation" in chart["aria-label"] for chart in charts)  # mfu is null throughout
    names = [curve["name"] for curve in json.loads(charts[0]["data-chart"])["curves"]]
    assert names == ["total", "image", "text"]


def test_a_run_that_goes_on_names_its_parent(run):
    recipe = json.loads((run / "vision" / "recipe.json").read_text())
    recipe["identity"] = {"continues": {"from": "/runs/base/vision", "step": 20}}
    (run / "vision" / "recipe.json").write_text(json.dumps(recipe))
    (run / "fusion" / "recipe.json").write_text(json.dumps({"identity": {"continues": EVIL}}))
    assert "goes on from step 20 of /runs/base/vision" in read(run).text


def test_evaluations_during_training_are_curves(run):
    lines = [{"step": step, "seconds": 1.0, "masked/image/accuracy": step, EVIL: 1.0} for step in (20, 40)]
    lines[0] |= {"masked/image/baseline": 5.0, f"{EVIL}/accuracy": 7.0}
    (run / "vision" / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read(run)
    charts = [attributes for tag, attributes in page.tags if tag == "figure"]
    (chart,) = [chart for chart in charts if chart["aria-label"].startswith("Held out: accuracy")]
    curves = json.loads(chart["data-chart"])["curves"]
    assert curves[0]["name"] == "masked/image"
    assert not any("baseline" in chart["aria-label"] for chart in charts)
    check_inert(write_report(run).read_text(encoding="utf-8"))


def test_untrusted_text_stays_text(run):
    assert check_inert(write_report(run).read_text(encoding="utf-8")).inline["script"]


def test_hidden_words_are_marked_and_wrong_guesses_underlined(run):
    html = write_report(run).read_text()
    assert "a <mark>red</mark> circle" in html
    assert '<span class="off">blue</span> &lt;script&gt;' in html


def test_a_missing_picture_is_left_out_and_named(run):
    page = read(run)
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    assert "samples/gone.png is no picture of this stage" in page.text


@pytest.mark.parametrize("path", ["../../secret.png", "/secret.png", "samples/link.png", "samples/page.png"])
def test_no_file_outside_the_stage_and_no_other_kind_is_embedded(run, path):
    Image.new("RGB", (4, 4)).save(run.parent / "secret.png")
    (run / "fusion" / "samples" / "link.png").symlink_to(run.parent / "secret.png")
    (run / "fusion" / "samples" / "page.png").write_text("<svg onload='alert(1)'/>")
    name = str(run.parent / "secret.png") if path == "/secret.png" else path
    (run / "fusion" / "samples.json").write_text(json.dumps({"masked": [{"input": name}]}))
    page = read(run)
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "is no picture of this stage" in page.text


def test_large_pictures_are_made_small(run):
    Image.effect_noise((1500, 1500), 80).save(run / "fusion" / "samples" / "a.png")
    assert (run / "fusion" / "samples" / "a.png").stat().st_size > 1_000_000
    assert write_report(run).stat().st_size < 300_000


def test_retrieval_samples_show_hits_and_misses(run):
    Image.new("RGB", (8, 8), "blue").save(run / "retrieval" / "samples" / "q.png")
    shown = [
        {"direction": "text_to_image", "query_text": f"blue {EVIL}", "query_image": None, "rank": 2, "results": [
            {"image": "samples/q.png", "text": f"one {EVIL}", "right": False},
            {"image": "samples/q.png", "text": "two", "right": True}]},
        {"direction": "image_to_text", "query_text": None, "query_image": "samples/q.png", "rank": 1, "results": [
            {"image": None, "text": "a blue & white square", "right": True}]},
        {"direction": "image_to_text", "query_text": 7, "rank": "first", "results": "none"},
    ]  # fmt: skip
    (run / "retrieval" / "samples.json").write_text(json.dumps({"retrieval": shown}))
    page = read(run)
    assert "✗ rank 2" in page.text and "✓ rank 1" in page.text and "a blue & white square" in page.text
    assert [a["alt"] for t, a in page.tags if t == "img"][1:4] == [f"one {SHOWN}", "two", "query picture"]
    check_inert((run / "report.html").read_text())


def test_written_captions_stand_beside_those_of_people(run):
    Image.new("RGB", (8, 8), "blue").save(run / "fusion" / "samples" / "c.png")
    shown = [{"input": "samples/c.png", "written": f"a blue {EVIL}", "references": "blue / navy"}, {"written": 3}, "x"]
    (run / "fusion" / "samples.json").write_text(json.dumps({"captions": shown, "captions/familiar": shown[:1]}))
    page = read(run)
    assert "Captions of held-out pictures" in page.text and "Captions of familiar pictures" in page.text
    assert "blue / navy" in page.text and f"a blue {SHOWN}" in page.text
    check_inert((run / "report.html").read_text())


def test_a_number_of_no_other_table_stands_beside_its_baseline(tmp_path):
    write_stage(tmp_path, "captions", eval={"captions/CIDEr": 61.25, "captions/baseline": 12.5, "seconds": 3.0})
    table = format_table(tmp_path)
    assert re.search(r"^captions: captions/CIDEr +61\.25 +12\.5$", table, re.M)
    assert re.search(r"^captions: seconds +3$", table, re.M)
    assert re.search(r"captions/CIDEr\s*61\.25\s*12\.5", read(tmp_path).text)


def test_a_baseline_stands_beside_no_other_figure(tmp_path):
    """That of CIDEr is no BLEU, and that of matching's accuracy is not chance of its choice."""
    captions = {"captions/CIDEr": 61.25, "captions/baseline": 12.5, "captions/BLEU-4": 30.5, "captions/ROUGE-L": 50.5}
    write_stage(tmp_path, "captions", eval=captions)
    matching = {"matching/accuracy": 80.5, "matching/baseline": 60.25, "matching/choice": 90.5}
    write_stage(tmp_path, "fusion", eval=matching)
    table = format_table(tmp_path)
    for row in ("captions/BLEU-4 +30.5", "captions/ROUGE-L +50.5", "matching/choice +90.5"):
        assert re.search(rf": {row}$", table, re.M), table
    assert re.search(r"matching/accuracy +80.5 +60.25$", table, re.M)


def test_the_first_numbers_are_those_of_all_candidates_and_not_of_folds(tmp_path):
    """In COCO's 1K protocol a query has a fifth of the candidates, and scratch's tile was of all of them."""
    folds = {key.replace("retrieval/", "retrieval/folds/"): 91.5 for key in recalls(0) if "R@" in key}
    folds["retrieval/folds/candidates"] = 64.0
    write_stage(tmp_path, "retrieval", eval=recalls(71.25) | folds)
    write_stage(tmp_path, "scratch", eval=recalls(20.5) | folds)
    tiles = _tiles(load_run(tmp_path))
    assert [value for name, value, *_ in tiles if name.startswith("R@1")] == ["71.2", "71.2"]
    assert all("from scratch 20.5 %" in below and "chance 0.4 %" in below for *_, below in tiles[:2])


def test_a_run_that_is_going_on_works(tmp_path):
    directory = write_stage(tmp_path, "vision", steps=500, lines=30)
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 31, "lo')
    text = read(tmp_path).text
    assert "step 30 of 500" in text and "No stage has been evaluated yet" in text
    assert "Not there yet: evaluation (eval.json), sample pictures (samples.json)." in text
    (directory / "weights.safetensors").write_bytes(b"x")
    assert "finished" in read(tmp_path).text


def test_damaged_files_are_notes_and_not_the_end(run):
    (run / "vision" / "eval.json").write_text("{")
    (run / "fusion" / "eval.json").write_text("[1]")
    (run / "retrieval" / "metrics.jsonl").write_text("hello\n")
    (run / "scratch" / "recipe.json").write_text(json.dumps({"name": EVIL, "stages": 3, "model": {"dim": "x"}}))
    (run / "scratch" / "eval.json").write_text(json.dumps({"masked/image/accuracy": math.nan, "retrieval/x": None}))
    with open(run / "scratch" / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "loss": Infinity, "lr": "high", "samples_per_s": 0, "samples_seen": null}\n')
    text = read(run).text
    assert "nan" not in text and "inf" not in text
    assert "eval.json could not be read" in text and "not a JSON object" in text and "line 1 is not" in text


def test_nulls_are_gaps():
    points = [(1, 1.0), (2, None), (3, 2.0), (4, 3.0)]
    shown = drawing(Chart("Loss", [Curve("a", points)]))
    _, (kind, path) = shown.paths
    assert kind == "line c0" and path.count("M") == 2 and path.count("L") == 1
    assert "nan" not in path + shown.data and drawing(Chart("Loss", [Curve("a", [(1, None)])])) is None


def test_a_histogram_shows_its_filled_part_and_names_some_edges():
    shown = histogram("Words", (0, 1, 2, 4, 8, 16), (0, 0, 3, 9000, 0), (0, 2, 16), "words")
    assert [height for _, _, height, _ in shown.bars] == [0, 1, 100, 0]
    assert [label for *_, label in shown.bars][1:3] == ["2 to 4 words: 3 (< 0.1 %)", "4 to 8 words: 9,000 (100.0 %)"]
    assert shown.labels == [(25.0, "2"), (100.0, "16")]
    assert histogram("Words", (0, 1, 2), (0, 0), (0,)) is None


def test_long_curves_are_thinned_and_keep_their_spikes():
    points = [(step, 50.0 if step == 7777 else math.sin(step / 500)) for step in range(20_000)]
    thin = downsampled(points)
    assert len(thin) <= 400 and thin[0] == points[0] and thin[-1] == points[-1] and (7777, 50.0) in thin
    assert [step for step, _ in thin] == sorted({step for step, _ in thin})
    assert downsampled(points[:400]) == points[:400]


def test_smoothing_keeps_a_line_and_calms_noise():
    line = [(step, 3.0 - step / 100) for step in range(200)]
    assert [v for _, v in smoothed(line)][:190] == pytest.approx([v for _, v in line][:190])
    noise = [(step, float(step % 2)) for step in range(600)]
    assert all(abs(v - 0.5) < 0.06 for _, v in smoothed(noise)[20:])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.37, 0.371), (-5, 1e6), (3, 3), (0, 0), (1e-8, 9e-4)])
def test_ticks_are_few_and_cover_the_data(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 8 and ticks[0] <= low + 1e-12 and ticks[-1] >= high * (1 - 1e-9)


def test_numbers_are_short():
    labels = {0: "0", 7.5e-4: "7.5e-4", 0.25: "0.25", 2500: "2500", 12_500: "12.5k", 3.2e6: "3.2M", -1.5: "-1.5"}
    assert {value: number(value) for value in labels} == labels


def test_table_has_the_same_rows(run):
    table = format_table(run)
    rows = retrieval_rows(load_run(run))
    assert [row.stage for row in rows] == ["retrieval", "scratch"]
    assert re.search(r"^retrieval( +71\.2){6}$", table, re.M)
    assert re.search(r"^scratch: same budget, no pretraining( +20\.5){6}$", table, re.M)
    assert re.search(r"^vision: image patches +31\.5 +12\.2$", table, re.M)
    assert re.search(r"^fusion: words in pairs +77\.5 +-$", table, re.M)
    assert "zero_shot/accuracy" in table and "0.4" in table  # chance of 256
    assert len(masked_rows(load_run(run))) == 2


def test_no_escape_code_gets_to_the_terminal(run):
    write_stage(run, "a\x1b[2J\u202e", eval={"masked/image\0/accuracy": 1.0, "\x1b[31m": 2.0})
    table = format_table(run)
    assert "a\ufffd[2J\ufffd: image\ufffd" in table and table.replace("\n", "").isprintable()


def test_text_of_all_scripts_stays():
    assert visible("Ünï 赤い 👩\u200d👧\n<b>\u202e\x07\udcff") == "Ünï 赤い 👩\u200d👧 <b>\ufffd\ufffd\ufffd"
    assert "u202e" not in drawing(Chart("Loss", [Curve("\u202e", [(1, 1.0)])])).data  # what the script shows


def test_user_errors_are_one_sentence_and_code_2(tmp_path, capsys):
    assert main(["--run-dir", str(tmp_path / "nowhere")]) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert main(["--run-dir", str(tmp_path)]) == 2
    assert "holds no stage" in capsys.readouterr().err


def test_ctrl_c_is_one_sentence_and_code_130(run, capsys, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pretrain.report.__main__.write_report", stop)
    assert main(["--run-dir", str(run)]) == 130 and capsys.readouterr().err.startswith("stopped; ")


def test_a_page_that_cannot_be_written_leaves_the_old_one(run, capsys, monkeypatch):
    assert main(["--run-dir", str(run)]) == 0
    before = (run / "report.html").read_bytes()

    def full(path, *_):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["--run-dir", str(run)]) == 2
    assert "report.html" in capsys.readouterr().err and not list(run.glob(".*"))
    assert (run / "report.html").read_bytes() == before


def test_another_evaluation_stands_apart_and_rows_of_other_candidates_say_so(run):
    differs = {"evals.0.samples": [256, 8], "evals.0.pairs.shards": ["a", EVIL]}
    (run / "retrieval" / "eval-8.json").write_text(json.dumps({"retrieval/x": 99.5, "step": 3, "differs": differs}))
    (run / "vision" / "eval-ab12.json").write_text(json.dumps({"masked/image/accuracy": 3.5}))
    page, table = read(run).text, format_table(run)
    assert "99.5" in page and "99.5" in table and "evals.0.samples=8" in page and "evals.0.samples=8" in table
    assert "weights" in table and len(masked_rows(load_run(run))) == 2 and "candidates)" not in table
    (run / "scratch" / "eval.json").write_text(json.dumps(recalls(20.5) | {"retrieval/candidates": 64.0}))
    assert {row.label.rpartition("(")[2] for row in retrieval_rows(load_run(run))} == {
        "256 candidates)",
        "64 candidates)",
    }
