"""from_table: each kind of input, what it leaves out and why, kills, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools import from_table
from data_tools.from_table import main
from data_tools.shards.steps import read_drops, read_steps
from pretrain.data.shards.reader import ShardReader, load_manifest
from tests.toys import encoded, picture, png_bomb, read_all, refused


def make_pictures(folder: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kinds = {"png": "PNG", "bmp": "BMP", "gif": "GIF", "webp": "WEBP"}
        path.write_bytes(encoded(picture(seed), kinds.get(path.suffix[1:].lower(), "JPEG")))
    return folder


def made(out: Path, *arguments: object) -> list[dict[str, Any]]:
    """The JSON of every sample, by name, with its txt and the endings of its pictures."""
    assert main([*map(str, arguments), "--out", str(out), "--workers", "1"]) == 0
    return samples(out)


def samples(out: Path) -> list[dict[str, Any]]:
    found = []
    for manifest in sorted(out.rglob("manifest.json")):
        for sample in read_all(manifest.parent):
            text = sample["txt"].decode() if "txt" in sample else None
            split = {"split": str(manifest.parent.relative_to(out)), "txt": text}
            endings = "+".join(sorted(set(sample) - {"txt", "json", "__key__"}))
            found.append(json.loads(sample["json"]) | split | {"pictures": endings})
    return sorted(found, key=lambda sample: sample["name"])


def test_a_folder_with_captions_beside_its_pictures(tmp_path, capsys):
    folder = make_pictures(tmp_path / "in", "a.jpg", "deep/b.PNG", "c.bmp", "deep/d.gif", "e.webp", ".hidden/f.jpg")
    (folder / "a.txt").write_text("a red bus\n\n a second caption \n")
    (folder / "broken.jpg").write_bytes(b"no picture")
    (folder / "bomb.png").write_bytes(png_bomb())
    (folder / "notes.txt").write_text("of no picture")
    rows = made(tmp_path / "out", folder)
    assert [(row["name"], row["pictures"]) for row in rows] == [
        ("a.jpg", "jpg"), ("c.bmp", "png"), ("deep/b.PNG", "png"), ("deep/d.gif", "png"), ("e.webp", "webp")
    ]  # fmt: skip
    assert rows[0]["captions"] == ["a red bus", "a second caption"] and rows[0]["txt"] == "a red bus"
    assert rows[1]["captions"] == [] and rows[1]["txt"] is None
    shown = capsys.readouterr()
    assert "5 of 7 records, 1 with several captions" in shown.out and "bad_picture 2" in shown.err
    step = read_steps(tmp_path / "out")["from_table"]
    assert (step.rows, step.kept, step.dropped) == (7, 5, {"bad_picture": 2})
    assert {drop.key for drop in read_drops([tmp_path / "out/steps/from_table.parquet"])} == {"broken.jpg", "bomb.png"}


def test_folders_are_labels_and_splits(tmp_path):
    names = ("train/cat/1.jpg", "train/dog/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg")
    folder = make_pictures(tmp_path / "in", *names)
    rows = made(tmp_path / "out", folder, "--label-folders")
    assert [(r["name"], r["split"], r["label"], r["label_name"]) for r in rows] == [
        ("train/cat/1.jpg", "train", 0, "cat"), ("train/dog/1.jpg", "train", 1, "dog"),
        ("train/dog/2.jpg", "train", 1, "dog"), ("val/cat/3.jpg", "val", 0, "cat"),
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/labels.json").read_text()) == ["cat", "dog"]
    # Another set takes the numbers of the first one; what is not among them is left out.
    other = make_pictures(tmp_path / "other", "dog/5.jpg", "emu/6.jpg")
    rows = made(tmp_path / "out2", other, "--label-folders", "--labels", tmp_path / "out/labels.json")
    assert [(row["name"], row["label"]) for row in rows] == [("dog/5.jpg", 1)]
    assert read_steps(tmp_path / "out2")["from_table"].dropped == {"bad_label": 1}


def test_a_table_joins_the_rows_of_a_picture(tmp_path):
    folder = make_pictures(tmp_path / "img", "a.jpg", "b.jpg", "x/c.jpg")
    table = tmp_path / "t.csv"
    table.write_text(
        'file_name,Caption,label\na.jpg,"a bus, red",7\nb.jpg,"[""two"", ""texts""]",7\na.jpg,again,7\n'
        "c.jpg,by its name,0\na.jpg,other label,1\n../t.csv,outside,0\nnowhere.jpg,gone,0\n/etc/passwd,hostile,0\n"
        "b.jpg,,x y\n"
    )
    rows = made(tmp_path / "out", table, "--pictures", folder)
    assert [(row["captions"], row["label_name"]) for row in rows] == [
        (["a bus, red", "again"], "7"), (["two", "texts"], "7"), (["by its name"], "0")
    ]  # fmt: skip
    assert read_steps(tmp_path / "out")["from_table"].dropped == {"bad_row": 3, "contradiction": 2}
    held = made(tmp_path / "held", table, "--pictures", folder, "--held-out", "0.5", "--seed", "3")
    assert {row["split"] for row in held} == {"train", "heldout"} and len(held) == 3


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.parquet", "t.tsv"])
def test_tables_of_other_kinds_say_the_same(tmp_path, name):
    folder = make_pictures(tmp_path, "a.jpg", "b.jpg")
    rows = [
        {"image": "a.jpg", "captions": ["one", "two"], "split": "train"},
        {"image": "b.jpg", "captions": ["three"], "split": "test"},
    ]
    path = folder / name
    if name == "t.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif name == "t.tsv":
        lines = ["image\tcaptions\tsplit", *(f"{r['image']}\t{json.dumps(r['captions'])}\t{r['split']}" for r in rows)]
        path.write_text("\n".join(lines))
    else:
        path.write_text(json.dumps(rows) if name == "t.json" else "\n".join(map(json.dumps, rows)))
    found = made(tmp_path / "out", path)
    assert [(row["split"], row["captions"]) for row in found] in (
        [("test", ["three"]), ("train", ["one", "two"])], [("train", ["one", "two"]), ("test", ["three"])]
    )  # fmt: skip


def test_coco_and_karpathy_keep_all_captions(tmp_path):
    folder = make_pictures(tmp_path / "img", "val2014/COCO_val2014_000000000042.jpg", "train2014/9.jpg")
    images = [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, {"id": 9, "file_name": "9.jpg"}, {"id": 1}]
    notes = [{"image_id": n, "caption": f"caption {k} of {n}"} for k in range(5) for n in (42, 9)]
    (tmp_path / "coco.json").write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))
    rows = made(tmp_path / "coco", tmp_path / "coco.json", "--pictures", folder)
    assert [row["captions"] for row in rows] == [[f"caption {k} of {n}" for k in range(5)] for n in (9, 42)]
    karpathy = [
        {
            "filename": "COCO_val2014_000000000042.jpg",
            "split": "restval",
            "sentences": [{"raw": "one"}, {"raw": "two"}],
        },
        {"filename": "9.jpg", "split": "test", "sentences": [{"raw": "three", "tokens": []}]},
    ]
    (tmp_path / "k.json").write_text(json.dumps({"images": karpathy, "dataset": "coco"}))
    rows = made(tmp_path / "karpathy", tmp_path / "k.json", "--pictures", folder)
    assert [(row["split"], row["captions"]) for row in rows] == [("test", ["three"]), ("train", ["one", "two"])]


def test_questions_with_their_answers(tmp_path):
    folder = make_pictures(tmp_path / "img", "COCO_val2014_000000000042.jpg", "COCO_val2014_000000000007.jpg")
    questions = [
        {"image_id": i, "question_id": q, "question": f"what {q}?"} for i, q in ((42, 1), (42, 2), (8, 3), (7, 4))
    ]
    answers = [{"question_id": q, "answers": [{"answer": "red"}] * 9 + [{"answer": "blue"}]} for q in (1, 2, 3)]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions, "data_subtype": "val2014"}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
    rows = made(tmp_path / "out", tmp_path / "q.json", "--pictures", folder, "--answers", tmp_path / "a.json")
    assert [(row["question_id"], row["txt"], len(row["answers"])) for row in rows] == [
        (1, "what 1?", 10),
        (2, "what 2?", 10),
    ]
    assert read_steps(tmp_path / "out")["from_table"].dropped == {"bad_row": 2}  # no picture 8, no answers to 4
    assert len(made(tmp_path / "test", tmp_path / "q.json", "--pictures", folder)) == 3  # a test set has none


def test_sentences_about_two_pictures(tmp_path):
    folder = make_pictures(tmp_path / "img", *(f"3/dev-8-{n}-img{side}.png" for n in (0, 1) for side in (0, 1)))
    lines = [
        {"identifier": f"dev-8-{n}-0", "sentence": f"sentence {n}", "label": label}
        for n, label in enumerate(("True", "False"))
    ]
    (tmp_path / "dev.json").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, [*lines, lines[0] | {"label": "Perhaps"}])))
    rows = made(tmp_path / "out", tmp_path / "dev.json", "--pictures", folder)
    assert [(row["label"], row["label_name"], row["pictures"]) for row in rows] == [
        (1, "True", "jpe+png"),
        (0, "False", "jpe+png"),
    ]
    reader = ShardReader(load_manifest(str(tmp_path / "out")))
    stored = {json.loads(s["json"])["name"]: s for s in (reader.read(0, n) for n in range(2))}
    assert stored["dev-8-1-0"]["jpe"] == (folder / "3/dev-8-1-img1.png").read_bytes()


def test_sentences_that_a_picture_entails_or_not(tmp_path):
    """SNLI-VE's lines, with SNLI's further fields, and its label for no agreement."""
    folder = make_pictures(tmp_path / "img", *(f"{n}.jpg" for n in (4705552913, 82)))
    labels = ("contradiction", "entailment", "-", "neutral", "maybe", "neutral")
    lines = [
        {"Flickr30K_ID": "4705552913", "pairID": f"4705552913.jpg#{n}r1n", "gold_label": label, "captionID": "x",
         "annotator_labels": [label], "sentence1": f"premise {n}", "sentence2": f"hypothesis {n}"}
        for n, label in enumerate(labels)
    ]  # fmt: skip
    lines[3]["Flickr30K_ID"], lines[5]["Flickr30K_ID"] = "82", "83"
    (tmp_path / "snli_ve_dev.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = made(tmp_path / "out", tmp_path / "snli_ve_dev.jsonl", "--pictures", folder)
    assert [(row["txt"], row["label"], row["label_name"], row["pair_id"]) for row in rows] == [
        ("hypothesis 0", 2, "contradiction", "4705552913.jpg#0r1n"),
        ("hypothesis 1", 0, "entailment", "4705552913.jpg#1r1n"),
        ("hypothesis 3", 1, "neutral", "4705552913.jpg#3r1n"),
    ]
    assert json.loads((tmp_path / "out/labels.json").read_text()) == ["entailment", "neutral", "contradiction"]
    assert read_steps(tmp_path / "out")["from_table"].dropped == {"bad_row": 2, "no_label": 1}  # maybe; no picture 83


def write_datasets(root: Path, kind: str) -> Path:
    """As `datasets` does: pictures in the cells, the names of classes in the schema."""
    noted = {
        "info": {"features": {"label": {"names": ["ship", "cat"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}}
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image), ("label", pa.int64()), ("text", pa.string())], {"huggingface": json.dumps(noted)}
    )
    for split, seeds in (("train", range(5)), ("test", range(5, 7))):
        rows = [
            {"image": {"bytes": encoded(picture(n)), "path": f"{n}.jpg"}, "label": n % 2, "text": f"text {n}"}
            for n in seeds
        ]
        if split == "test":
            rows[1]["image"]["bytes"] = b"no picture"
        table = pa.Table.from_pylist(rows, schema)
        if kind == "parquet":
            path = root / "data" / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path, row_group_size=2)
        else:
            path = root / split / "data-00000-of-00001.arrow"
            path.parent.mkdir(parents=True, exist_ok=True)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
                writer.write_table(table, max_chunksize=2)
    return root


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_directories_of_datasets(tmp_path, kind):
    rows = made(tmp_path / "out", write_datasets(tmp_path / "in", kind), "--samples-per-shard", "2")
    assert [(row["split"], row["label_name"], row["txt"]) for row in rows if row["split"] == "train"] == [
        ("train", ("ship", "cat")[n % 2], f"text {n}") for n in range(5)
    ]
    assert [row["txt"] for row in rows if row["split"] == "test"] == ["text 5"]
    assert json.loads((tmp_path / "out/labels.json").read_text()) == ["ship", "cat"]


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.tar"))}


def test_kills_and_workers_change_nothing(tmp_path, monkeypatch):
    folder = make_pictures(tmp_path / "in", *(f"{n}.jpg" for n in range(7)))
    (folder / "5.jpg").write_bytes(b"no picture")
    line = [str(folder), "--samples-per-shard", "2", "--out"]
    assert main([*line, str(tmp_path / "whole"), "--workers", "2"]) == 0
    real, calls = from_table.write_shard, []

    def dies(job):
        calls.append(job.number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(job)

    monkeypatch.setattr(from_table, "write_shard", dies)
    assert main([*line, str(tmp_path / "killed"), "--workers", "1"]) == 130
    assert not (tmp_path / "killed/manifest.json").exists()
    assert main([*line, str(tmp_path / "killed"), "--workers", "1"]) == 0 and calls == [0, 1, 2, 2, 3]
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert read_steps(tmp_path / "killed")["from_table"].dropped == {"bad_picture": 1}


def test_large_pictures_are_shrunk(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(np.zeros((90, 120, 3), np.uint8)).save(folder / "a.png")
    made(tmp_path / "out", folder, "--max-side", "60")
    (sample,) = read_all(tmp_path / "out")
    (tmp_path / "a.png").write_bytes(sample["png"])
    assert Image.open(tmp_path / "a.png").size == (60, 45)


def test_what_cannot_be_used_is_one_sentence(tmp_path, capsys):
    folder = make_pictures(tmp_path / "in", "a.jpg")
    out = tmp_path / "out"

    def said(*arguments: object) -> str:
        return refused(capsys, main, *arguments, "--out", out, "--workers", "1")

    for name, content in {
        "empty.csv": "", "columns.csv": "url,caption\nhttp://x,y\n", "rows.csv": "image,caption\nb.jpg,x\n",
        "noise.json": "no json", "other.json": '{"images": []}', "list.jsonl": "[1]\n[2]\n", "notes.md": "x",
        "questions.json": '{"questions": [{"question_id": 1, "image_id": 2, "question": "x"}]}', "labels.json": "{}",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(content)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "bad.arrow").write_bytes(b"ARROW1\0\0" + b"\xff" * 99)
    (tmp_path / "nothing").mkdir()
    assert "does not exist" in said(tmp_path / "nowhere")
    assert "has no picture" in said(tmp_path / "nothing")
    assert "is empty; its first line" in said(tmp_path / "empty.csv")
    assert "has no column of pictures" in said(tmp_path / "columns.csv")
    assert "--caption-col x: " in said(tmp_path / "rows.csv", "--caption-col", "x")
    assert "has no usable record (the first: rows.csv, row 1: 'b.jpg' is no file" in said(tmp_path / "rows.csv")
    assert "is not a JSON list" in said(tmp_path / "noise.json")
    assert "has neither COCO's images" in said(tmp_path / "other.json")
    assert "list.jsonl has no column of pictures" in said(tmp_path / "list.jsonl")
    assert "is neither a folder nor one of" in said(tmp_path / "notes.md")
    assert "is not a parquet or arrow file" in said(tmp_path / "bad.parquet")
    assert "is not a parquet or arrow file" in said(tmp_path / "bad.arrow")
    assert "has no annotations with a question_id" in said(
        tmp_path / "questions.json", "--answers", tmp_path / "other.json"
    )
    assert "--answers belongs to" in said(folder, "--answers", tmp_path / "other.json")
    assert "--label-folders belongs to" in said(tmp_path / "rows.csv", "--label-folders")
    assert "is no list of names" in said(folder, "--labels", tmp_path / "labels.json")
    assert "lies in no folder" in said(folder, "--label-folders")
    assert "--held-out 1.0 is no share" in said(folder, "--held-out", "1")
    assert "--max-side 0 is below 1" in said(folder, "--max-side", "0")
    assert not out.exists()
    (folder / "a.jpg").write_bytes(b"no picture")
    assert "none of the 1 records" in said(folder)
    make_pictures(folder, "a.jpg", "b.jpg")
    assert "was started with records=" in said(folder)
    out.joinpath("from_table.json").unlink()
    out.joinpath("mine.txt").write_text("mine")
    assert "contains other files" in said(folder)
