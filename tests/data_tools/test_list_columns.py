"""Columns of a list: several captions of a picture, and the types that are no captions."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import download, filter_list, rewrite
from data_tools.lists.reading import open_list
from data_tools.shards.steps import read_steps
from pretrain.data.sources import captions_of
from tests.data_tools.hostile_server import HostileServer
from tests.toys import needs, read_all, refused

TEXTS = pa.list_(pa.string())
LISTS = [["a red bus", "a bus"], ["  ", None, "a blue car "], [], None, ["x" * 70_000], ["a\0b", "fine"]]
FIRST = ["a red bus", "a blue car", "fine"]
ALL = [["a red bus", "a bus"], ["a blue car"], ["fine"]]
DROPPED = {"empty_caption": 2, "long_caption": 1}


def urls(count: int) -> list[str]:
    return [f"http://a.example/{number}.jpg" for number in range(count)]


def save(path: Path, captions: pa.Array) -> Path:
    pq.write_table(pa.table({"url": urls(len(captions)), "caption": captions}), path)
    return path


def read(path: Path, captions: str | None = None, preset: str = "canonical") -> tuple[list, dict[str, int]]:
    rows = open_list([path], preset, captions=captions)
    name = "captions" if rows.all_captions else "caption"
    return [text for batch in rows.batches(4) for text in batch[name].to_pylist()], dict(rows.dropped)


def lists_as(kind: str) -> pa.Array:
    plain = pa.array(LISTS, TEXTS)
    if kind == "of dictionary":
        return pa.ListArray.from_arrays(plain.offsets, plain.values.dictionary_encode(), mask=plain.is_null())
    if kind == "slice":
        return pa.array([["gone"], *LISTS], TEXTS).slice(1)
    return plain.cast(pa.large_list(pa.large_string())) if kind == "large" else plain


@pytest.mark.parametrize("kind", ["plain", "large", "of dictionary", "slice"])
def test_lists_of_captions_in_parquet_give_their_first_usable_one_or_all(tmp_path, kind):
    path = save(tmp_path / "l.parquet", lists_as(kind))
    assert read(path) == (FIRST, DROPPED) and read(path, "all") == (ALL, DROPPED)


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "python.csv", "parquet"])
def test_lists_of_captions_as_text_are_read_as_lists(tmp_path, form):
    """Of JSON, and of JSON and Python as programs write lists into tables."""
    lists, path = [['a "red" bus, it\'s', "a bus"], ["[two]"], []], tmp_path / f"l.{form}"
    rows = [{"url": url, "caption": texts} for url, texts in zip(urls(3), lists, strict=True)]
    written = [str(texts) if form.startswith("python") else json.dumps(texts) for texts in lists]
    if form == "parquet":
        save(path, pa.array([*written, "[a caption]"]))
    elif form.endswith("csv"):
        cells = ['"' + text.replace('"', '""') + '"' for text in [*written, "[a caption]"]]
        path.write_text("url,caption\n" + "".join(f"{url},{text}\n" for url, text in zip(urls(4), cells, strict=True)))
    else:
        rows.append({"url": urls(4)[3], "caption": "[a caption]"})
        path.write_text("\n".join(map(json.dumps, rows)) if form == "jsonl" else json.dumps(rows))
    assert read(path) == (['a "red" bus, it\'s', "[two]", "[a caption]"], {"empty_caption": 1})
    assert read(path, "all")[0] == [*lists[:2], ["[a caption]"]]


@pytest.mark.timeout(20)
def test_a_hostile_cell_does_not_keep_the_reader(tmp_path):
    path = save(tmp_path / "l.parquet", pa.array(["[" + " " * 60_000 + "x]", "['a'" + ", 'b'" * 10_000]))
    assert [len(text) for text in read(path)[0]] == [60_003, 50_004]


@pytest.mark.parametrize(
    "captions",
    [
        pa.array([{"raw": "a bus"}, {"raw": "a car"}]),
        pa.array([[{"raw": "a bus"}], []]),
        pa.array([[["a bus"]], []]),
        pa.array([float("nan"), 1.5]),
        pa.array([7, 8]),
        pa.array([True, None]),
        pa.array([[("en", "a bus")], []], pa.map_(pa.string(), pa.string())),
        pa.DictionaryArray.from_arrays(pa.array([0, 1], pa.int32()), pa.array([1.5, 2.5])),
    ],
    ids=lambda captions: str(captions.type)[:30],
)
def test_other_types_are_refused(tmp_path, capsys, captions):
    path = save(tmp_path / "l.parquet", captions)
    arguments = ["--list", path, "--preset", "canonical", "--out", tmp_path / "o" / "kept.parquet"]
    assert "the column 'caption' of" in (error := refused(capsys, filter_list.main, *arguments))
    assert "not text or lists of texts; choose another" in error


def test_only_the_texts_of_json_are_captions(tmp_path):
    values = ["good", {"raw": "x"}, 5, True, [1, 2], float("nan"), None, ["a", None]]
    lines = [json.dumps({"url": url, "caption": value}) for url, value in zip(urls(8), values, strict=True)]
    (tmp_path / "l.jsonl").write_text("\n".join(lines))
    assert read(tmp_path / "l.jsonl") == (["good", "a"], {"bad_row": 4, "empty_caption": 2})
    (tmp_path / "l.jsonl").write_text(lines[1])
    with pytest.raises(ValueError, match=r"none of the first 1 rows of .* \('caption' is an object, not text\)"):
        read(tmp_path / "l.jsonl")


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_column_that_stands_twice_is_refused(tmp_path, form):
    path = tmp_path / f"l.{form}"
    if form == "parquet":
        columns = [pa.array(urls(1)), pa.array(["x"]), pa.array(["y"])]
        pq.write_table(pa.Table.from_arrays(columns, ["url", "caption", "caption"]), path)
    else:
        path.write_text(f"url,caption,caption\n{urls(1)[0]},x,y\n")
    with pytest.raises(ValueError, match="has 2 columns called 'caption'; give each a name of its own"):
        read(path)


def test_numbers_of_any_type_are_numbers_or_missing(tmp_path):
    columns = {"url": urls(2), "caption": ["a", "b"], "row": ["7", "x"], "width": [{"px": 1}, {"px": 2}]}
    columns |= {"similarity": pa.array([[0.5], None]), "language": pa.array([1, 2])}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    (batch,) = open_list([tmp_path / "l.parquet"], "canonical").batches()
    assert batch["row"].to_pylist() == [7, 1]
    assert (
        batch.select(["similarity", "width", "language"]).to_pylist()
        == [dict.fromkeys(("similarity", "width", "language"))] * 2
    )


def test_coco_has_a_list_of_captions_for_each_picture(tmp_path):
    images = [{"id": n, "coco_url": url, "width": 4} for n, url in enumerate(urls(2))]
    notes = [{"image_id": n % 2, "caption": text} for n, text in enumerate(["one", "two", "three", 4])]
    (tmp_path / "c.json").write_text(json.dumps({"annotations": notes, "images": images}))
    assert read(tmp_path / "c.json", "all", "coco") == ([["one", "three"], ["two"]], {})
    assert read(tmp_path / "c.json", None, "coco") == (["one", "two", "three"], {"bad_row": 1})
    regions = [{"id": 5, "regions": [{"phrase": "a cat"}, {"phrase": "a mat"}, 7]}, {"id": 6, "regions": 8}]
    (tmp_path / "r.json").write_text(json.dumps(regions))
    pictures = [{"image_id": 5, "url": urls(2)[0]}, {"image_id": 6, "url": urls(2)[1]}]
    (tmp_path / "i.json").write_text(json.dumps(pictures))
    rows = open_list([tmp_path / "r.json", tmp_path / "i.json"], "visual_genome", captions="all")
    assert [batch["captions"].to_pylist() for batch in rows.batches()] == [[["a cat", "a mat"]]]
    assert rows.dropped == {"bad_row": 2, "empty_caption": 1}


@pytest.mark.slow
def test_all_captions_travel_to_the_sample_and_the_loader(tmp_path):
    needs("img2dataset")
    lists = [["a red bus in the rain", "the bus"], ["a blue car in the sun"]]
    with HostileServer() as server:
        table = {"url": [server.url("jpg", n) for n in range(2)], "caption": pa.array(lists, TEXTS)}
        pq.write_table(pa.table(table), tmp_path / "l.parquet")
        kept = tmp_path / "list" / "kept.parquet"
        line = ["--list", tmp_path / "l.parquet", "--preset", "generic", "--url-col", "url", "--caption-col", "caption"]
        assert filter_list.main([*map(str, line), "--captions", "all", "--out", str(kept)]) == 0
        line = ["--list", kept, "--preset", "canonical", "--out", tmp_path / "web", "--workers", "1"]
        assert download.main([*map(str, line), "--threads", "2", "--allow-address", "127.0.0.1/32"]) == 0
    assert read_steps(tmp_path / "web")["download"].kept == 2
    assert rewrite.main([str(tmp_path / "web"), "--out", str(tmp_path / "clean"), "--max-side", "20"]) == 0
    for place in ("web", "clean"):
        samples = sorted(read_all(tmp_path / place), key=lambda sample: sample["__key__"])
        assert [captions_of(sample) for sample in samples] == lists
        assert [sample["txt"].decode() for sample in samples] == [texts[0] for texts in lists]
        rows = pq.read_table(tmp_path / place / "00000.parquet").sort_by("key")
        assert rows["captions"].to_pylist() == lists
