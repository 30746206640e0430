"""The records of from_table, before anything is written: names of pictures, labels, held-out parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.records.plan import MOST_LABELS, Settings, make_plan
from data_tools.records.record import Pictures


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files with numbers, and a link to itself."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(40):
        (folder / f"COCO_{number:06d}.jpg").write_bytes(b"not read here")
    (folder / "circle.jpg").symlink_to("circle.jpg")
    return folder


@pytest.mark.parametrize("name", ["a caption, not a file. " * 20, "circle.jpg/a.jpg", "none.jpg", "\0", "../" * 2000])
def test_a_name_that_is_no_file_costs_only_its_row(folder, name):
    with pytest.raises(ValueError, match=r"is no file below|null"):
        Pictures(folder).find(name)
    table = folder.parent / "t.jsonl"
    rows = [{"image": name, "caption": "x"}, {"image": "COCO_000001.jpg", "caption": "y"}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plan = make_plan(Settings(table, folder))
    assert [record.captions for record in plan.splits[""]] == [("y",)] and len(plan.unusable) == 1


def test_labels_that_are_ids_are_refused_and_not_counted_up_to(folder):
    table = folder.parent / "t.csv"
    table.write_text(f"image,label\nCOCO_000001.jpg,{MOST_LABELS - 1}\n")
    assert len(make_plan(Settings(table, folder)).names) == MOST_LABELS
    table.write_text(f"image,label\nCOCO_000001.jpg,{MOST_LABELS}\nCOCO_000002.jpg,0\n")
    with pytest.raises(ValueError, match=r"the labels are numbers up to 1000000, .* choose another --label-col"):
        make_plan(Settings(table, folder))


def test_no_picture_is_in_training_and_held_out_however_many_questions_it_has(folder):
    questions = [{"image_id": n // 5, "question_id": n, "question": f"what {n}?"} for n in range(200)]
    (folder.parent / "q.json").write_text(json.dumps({"questions": questions}))
    splits = make_plan(Settings(folder.parent / "q.json", folder, held_out=0.3)).splits
    train, heldout = ({record.pictures for record in splits[name]} for name in ("train", "heldout"))
    # Picture 0 is among them: no other name that ends in no number, such as circle.jpg, stands for it.
    assert not train & heldout and len(train) + len(heldout) == 40 and len(heldout) > 5
