"""JSON that is damaged or of another kind, pipes given as files, and columns that pyarrow refuses are one sentence."""

from __future__ import annotations

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import download, filter_list, leaks, rewrite
from data_tools.fetch.slices import Slice, write_list
from data_tools.lists.parts import Parts, work_path
from data_tools.lists.reading import open_list
from data_tools.ownership import owned
from data_tools.shards.steps import read_drops, read_steps
from data_tools.text.documents import find_inputs
from tests.toys import encoded, pair_sample, picture, refused, write_source

DEEP = "[" * 100_000
HUGE = "9" * 400  # an integer that no float holds
STEP = '{"tool": "x", "rows": 1, "kept": 1, %s}'


@pytest.mark.parametrize(
    ("preset", "content"),
    [
        ("coco", '{"images": [], "annotations": ' + DEEP),
        ("sbu", '{"captions": {"a": ' + '{"a": ' * 100_000),
        ("generic", DEEP),
        ("visual_genome", '[{"regions": 5}]'),
        ("coco", '{"images": [{"id": 1, "coco_url": ["x"]}], "annotations": [{"image_id": 1, "caption": "c"}]}'),
        ("coco", '{"images": 5, "annotations": 6}'),
    ],
)
def test_a_list_of_damaged_json_is_refused_by_name(tmp_path, capsys, preset, content):
    (tmp_path / "l.json").write_text(content)
    line = ["--list", tmp_path / "l.json", "--preset", preset, "--out", tmp_path / "o" / "kept.parquet"]
    more = ["--url-col", "url", "--caption-col", "caption"] if preset == "generic" else []
    assert str(tmp_path / "l.json") in refused(capsys, filter_list.main, *line, *more)


def test_numbers_that_no_float_holds_are_missing(tmp_path):
    row = f'{{"url": "http://a/1", "caption": "c", "width": {HUGE}, "height": 1e999}}'
    (tmp_path / "l.jsonl").write_text(row)
    (batch,) = open_list([tmp_path / "l.jsonl"], "canonical").batches()
    assert batch["width"].to_pylist() == batch["height"].to_pylist() == [None]
    table = pa.table({"url": ["http://a/1"], "caption": ["c"], "width": pa.array([10**50], pa.decimal256(60))})
    pq.write_table(table, tmp_path / "l.parquet")
    (batch,) = open_list([tmp_path / "l.parquet"], "canonical").batches()
    assert batch["width"].to_pylist() == [None]


@pytest.mark.parametrize(
    "content",
    [
        *(DEEP, "[1]", "{}", STEP % f'"dropped": {DEEP}', STEP % '"dropped": [1]', STEP % '"dropped": {"a": "b"}'),
        *(STEP % f'"time": {HUGE}', STEP % f'"dropped": {{"a": {HUGE}}}', STEP % '"tool": 5'),
        *(STEP % '"time": "x"', STEP % '"settings": 5', STEP % '"inputs": 5', STEP % '"more": 1'),
        '{"tool": "x", "rows": "1", "kept": 1}',
    ],
)
def test_a_damaged_step_record_is_refused_by_name(tmp_path, content):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "a.json").write_text(json.dumps({"tool": "y", "rows": 2, "kept": 2}))
    (tmp_path / "steps" / "b.json").write_text(content)
    with pytest.raises(ValueError, match=r"b\.json is not a step record \(.*\); remove it, or run") as error:
        read_steps(tmp_path)
    assert len(str(error.value)) < 500


PLAN = {"list": ["l"], "fingerprint": "f", "preset": "canonical", "slices": 1, "samples_per_shard": 10}


@pytest.mark.parametrize("content", [DEEP, "5", '{"rows": "x"}', '{"rows": 1, "kept": 1, "first": 0, "digits": 5}'])
def test_damaged_records_of_unfinished_work_are_refused_by_name(tmp_path, content, capsys):
    pq.write_table(pa.table({"url": ["http://a/1"], "caption": ["c"]}), tmp_path / "l.parquet")
    out = tmp_path / "kept.parquet"
    work_path(out).mkdir()
    (work_path(out) / "00000.json").write_text(content if "first" not in content else '{"rows": {}}')
    with pytest.raises(ValueError, match=r"00000\.json is damaged"):
        Parts(out).done()
    part = Slice(tmp_path / "web", 0, 1, 10)
    part.list.mkdir(parents=True)
    (part.list / "list.json").write_text(content)
    with pytest.raises(ValueError, match=r"list\.json is damaged"):
        write_list(open_list([tmp_path / "l.parquet"], "canonical"), part)
    part.work.mkdir(parents=True)
    (part.work.parent / "plan.json").write_text(content)
    assert "plan.json is damaged" in refused(capsys, download.main, "--merge", "--out", part.out)
    (part.work.parent / "plan.json").write_text(json.dumps(PLAN))
    part.done.write_text(content)
    assert "done.json is damaged" in refused(capsys, download.main, "--merge", "--out", part.out)
    stamp = tmp_path / "stamp.json"
    stamp.write_text(content)
    refused_stamp = pytest.raises(ValueError, match="was started with")
    with refused_stamp, owned(tmp_path, {"size": 1}, stamp=stamp, work=tmp_path / ".work"):
        pass


@pytest.mark.timeout(60)
def test_a_pipe_given_as_a_file_is_refused(tmp_path, capsys):
    pipe = tmp_path / "a.csv"
    os.mkfifo(pipe)
    for name in ("a.jsonl", "a.parquet"):
        os.mkfifo(tmp_path / name)
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        line = ["--list", tmp_path / name, "--preset", "canonical", "--out", tmp_path / "o" / "k.parquet"]
        assert f"--list={tmp_path / name} is a named pipe, not a file" in refused(capsys, filter_list.main, *line)
    pq.write_table(pa.table({"url": ["http://a/1"], "caption": ["c"]}), tmp_path / "l.parquet")
    line = ["--list", tmp_path / "l.parquet", "--preset", "canonical", "--out", tmp_path / "o" / "k.parquet"]
    assert "named pipe" in refused(capsys, filter_list.main, *line, "--blocked-domains", pipe)
    shards = write_source(tmp_path / "shards", [[pair_sample("a")]])
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "a.jpg").write_bytes(encoded(picture(1)))
    assert "named pipe" in refused(capsys, rewrite.main, shards, "--out", tmp_path / "new", "--drop", pipe)
    line = [shards, "--against", f"a={tmp_path / 'eval'}", "--workers", "1"]
    assert "named pipe" in refused(capsys, leaks.main, *line, "--captions", f"a={pipe}")
    with pytest.raises(ValueError, match=r"a\.jsonl is a named pipe"):
        find_inputs([tmp_path / "a.jsonl"])
    os.mkfifo(tmp_path / "eval" / "b.jpg")
    assert leaks.main([str(shards), "--against", f"a={tmp_path / 'eval'}", "--workers", "1"]) == 0
    assert "b.jpg: is no file" in capsys.readouterr().err


@pytest.mark.parametrize("column", [pa.array([[1]]), pa.array([{"a": 1}])], ids=["list", "struct"])
def test_a_parquet_with_columns_of_other_types_is_refused_by_name(tmp_path, capsys, column):
    texts = {name: ["a"] for name in ("shard", "key", "reason", "detail")}
    pq.write_table(pa.table(texts | {"reason": column}), tmp_path / "d.parquet")
    with pytest.raises(ValueError, match=r"d\.parquet is not a drops file"):
        list(read_drops([tmp_path / "d.parquet"]))
    shards = write_source(tmp_path / "shards", [[pair_sample("a")]])
    pq.write_table(pa.table({"key": column}), shards / "00000.parquet")
    error = refused(capsys, rewrite.main, shards, "--out", tmp_path / "new")
    assert f"cannot read {shards / '00000.parquet'}" in error
