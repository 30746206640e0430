"""data_tools.download without the network: its errors, its slices, and which shards are complete."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import download
from data_tools.fetch.slices import ListedRows, Slice, SliceShards, account, owned_slice, write_list
from data_tools.lists.reading import open_list
from data_tools.shards.steps import read_steps
from tests.toys import refused


def a_list(path: Path, count: int) -> Path:
    captions = [f"caption {number}" for number in range(count)]
    pq.write_table(pa.table({"url": [f"http://a/{number}" for number in range(count)], "caption": captions}), path)
    return path


def finished(
    directory: Path,
    shard: int,
    rows: int,
    stats: str | None = None,
    errors: list[str | None] | None = None,
    tar: bytes = b"a tar",
) -> None:
    """Writes a shard like img2dataset's; by default every other row is an error."""
    directory.mkdir(parents=True, exist_ok=True)
    errors = errors or ([None, "HTTP Error 404: Not Found"] * rows)[:rows]
    statuses = ["failed_to_download" if error else "success" for error in errors]
    table = pa.table({"status": statuses, "error_message": pa.array(errors, pa.string())})
    pq.write_table(table, directory / f"{shard:05d}.parquet")
    (directory / f"{shard:05d}.tar").write_bytes(tar)
    (directory / f"{shard:05d}_stats.json").write_text(json.dumps({"count": rows}) if stats is None else stats)


@pytest.mark.parametrize(("rows", "per_shard", "slices"), [(45, 10, 2), (45, 10, 7), (1000, 10, 3), (5, 10, 1)])
def test_slices_share_no_row_and_no_shard(tmp_path, rows, per_shard, slices):
    path = a_list(tmp_path / "l.parquet", rows)
    seen: list[int] = []
    numbers: list[int] = []
    for number in range(slices):
        part = Slice(tmp_path / "out", number, slices, per_shard)
        shards = write_list(open_list([path], "canonical"), part)
        for file in sorted(part.list.glob("*.parquet")):
            seen += pq.read_table(file).column("row").to_pylist()
        numbers += shards.numbers
        assert write_list(open_list([path], "canonical"), part) == shards  # as it was written
    assert seen == list(range(rows))
    assert numbers == list(range(-(-rows // per_shard)))


def test_a_list_without_a_usable_row_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("IMGLISH_DOWNLOAD_PYTHON", sys.executable)
    rows = {"url": ["http://a/1", "http://a/2"], "caption": ["", None]}
    pq.write_table(pa.table(rows), tmp_path / "l.parquet")
    arguments = ["--list", tmp_path / "l.parquet", "--preset", "canonical", "--out", tmp_path / "out"]
    assert "all 2 rows are dropped (empty_caption 2)" in refused(capsys, download.main, *arguments)
    assert read_steps(tmp_path / "out")["list"].dropped == {"empty_caption": 2}


def test_files_of_a_list_contain_whole_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("data_tools.fetch.slices._PART_ROWS", 25)
    part = Slice(tmp_path, 0, 1, 10)
    shards = write_list(open_list([a_list(tmp_path / "l.parquet", 47)], "canonical"), part)
    assert [pq.read_metadata(file).num_rows for file in sorted(part.list.glob("*.parquet"))] == [20, 20, 7]
    assert [shards.rows_of(shard) for shard in shards.numbers] == [10, 10, 10, 10, 7]


def test_only_whole_shards_are_published(tmp_path):
    attempt = tmp_path / "attempt"
    shards = SliceShards(Slice(tmp_path, 0, 1, 10), ListedRows(rows=44, kept=44, dropped={}, first=0, digits=5))
    finished(attempt, 0, 10)
    finished(attempt, 1, 9)  # a row is missing, as on a full disk
    finished(attempt, 2, 10, stats='{"count": 1')  # being written
    finished(attempt, 3, 10)
    (attempt / "00003_stats.json").unlink()
    finished(attempt, 4, 4)  # the last one, which is shorter
    assert shards.publish(attempt) == {"success": 7, "http_404": 7}
    assert shards.published() == [0, 4]
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00004.tar"]


@pytest.mark.parametrize(("pictures", "replaced"), [(5, True), (3, True), (2, False)])
def test_a_shard_is_made_again_but_never_replaced_by_a_poorer_one(tmp_path, pictures, replaced):
    attempt = tmp_path / "attempt"
    shards = SliceShards(Slice(tmp_path, 0, 1, 6), ListedRows(rows=12, kept=12, dropped={}, first=0, digits=5))
    finished(tmp_path, 0, 6)
    finished(tmp_path, 1, 6, errors=[None] * 6)
    assert shards.repeat(lambda message: bool(message)) == 1
    assert shards.published() == [1] and shards.missing() == [0]
    shards.remove_incomplete()
    assert (tmp_path / "00000.tar").exists()  # until the new one is whole
    finished(attempt, 0, 6, errors=[None] * pictures + ["HTTP Error 404: Not Found"] * (6 - pictures), tar=b"new")
    counts = shards.publish(attempt)
    assert counts["success"] == (pictures if replaced else 3) and counts.total() == 6
    assert (tmp_path / "00000.tar").read_bytes() == (b"new" if replaced else b"a tar")
    assert shards.published() == [0, 1] and shards.kept == (set() if replaced else {0})
    assert not shards.publish(attempt)


@pytest.mark.parametrize("moved", [1, 2])
def test_an_interrupted_publication_is_finished(tmp_path, moved):
    attempt = tmp_path / "attempt"
    shards = SliceShards(Slice(tmp_path, 0, 1, 10), ListedRows(rows=10, kept=10, dropped={}, first=0, digits=5))
    finished(attempt, 0, 10)
    for ending in (".tar", ".parquet")[:moved]:
        (attempt / f"00000{ending}").rename(tmp_path / f"00000{ending}")
    assert shards.published() == []
    shards.publish(attempt)
    assert shards.published() == [0]


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "00000.parquet").write_text("no table")
    with pytest.raises(ValueError, match=r"cannot read .*00000\.parquet"):
        account(tmp_path / "00000.parquet")
    shards = SliceShards(Slice(tmp_path, 0, 1, 6), ListedRows(rows=6, kept=6, dropped={}, first=0, digits=5))
    finished(tmp_path, 0, 6)
    for columns in ({"status": ["success"] * 6}, {"x": [1]}):
        pq.write_table(pa.table(columns), tmp_path / "00000.parquet")
        with pytest.raises(ValueError, match=r"cannot read .*00000\.parquet"):
            shards.repeat(bool)


def test_a_slice_belongs_to_one_process(tmp_path):
    part = Slice(tmp_path, 0, 1, 10)
    plan = {"slices": 1}
    with owned_slice(part, plan), pytest.raises(ValueError, match=r"process \d+ on "), owned_slice(part, plan):
        pass
    with owned_slice(part, plan):
        pass


def refusal(capsys, rows: Path, out: Path, *more: str) -> str:
    return refused(capsys, download.main, "--list", rows, "--preset", "canonical", "--out", out, *more)


@pytest.fixture
def python(monkeypatch):
    monkeypatch.setenv("IMGLISH_DOWNLOAD_PYTHON", sys.executable)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--workers", "0"), "--workers=0 is below 1"),
        (("--samples-per-shard", "1"), "--samples-per-shard=1 is below 2"),
        (("--max-bytes", "0"), "--max-bytes=0 is below 1"),
        (("--allow-address", "here"), "--allow-address=here"),
        (("--refuse-address", "10.0.0.1/8"), "--refuse-address=10.0.0.1/8"),
        (("--max-pixels", "1000000000"), "--max-pixels=1000000000 is above what is decoded"),
        (("--encode-quality", "101"), "--encode-quality=101 is above the maximum"),
        (("--max-aspect-ratio", "nan"), "--max-aspect-ratio=nan"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, capsys, python, more, words):
    rows = a_list(tmp_path / "l.parquet", 3)
    out = tmp_path / "out"
    assert words in refusal(capsys, rows, out, *more)
    assert not out.exists()


@pytest.mark.parametrize("wrong", ["3/3", "1", "a/b", "-1/2", "0/0", "0/100001"])
def test_what_is_no_slice_is_refused(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit) as ended:
        download.main(["--list", "l", "--preset", "laion", "--out", str(tmp_path), f"--slice={wrong}"])
    assert ended.value.code == 2 and "--slice" in capsys.readouterr().err


def test_a_call_that_has_nothing_to_do_is_refused(tmp_path, capsys, python):
    assert "--list or --preset is missing" in refused(capsys, download.main, "--out", tmp_path)
    assert "has no download" in refused(capsys, download.main, "--merge", "--out", tmp_path)
    rows = a_list(tmp_path / "l.parquet", 0)
    assert "has no rows" in refusal(capsys, rows, tmp_path / "out")
    assert "reads as a pattern" in refusal(capsys, rows, tmp_path / "o[u]t")


def test_other_shards_are_not_touched(tmp_path, capsys, python):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_bytes(b"mine")
    rows = a_list(tmp_path / "l.parquet", 3)
    error = refusal(capsys, rows, tmp_path / "out")
    assert "contains other files" in error


def test_another_list_cannot_continue_in_the_same_place(tmp_path, capsys, python):
    """The environment is broken (this Python has no img2dataset), and that is reported too."""
    rows, out = a_list(tmp_path / "l.parquet", 3), tmp_path / "out"
    error = refusal(capsys, rows, out)
    if "img2dataset ended with code 1" not in error:
        pytest.skip("this environment has img2dataset")
    assert "No module named 'img2dataset'); bash launch/env/download.sh makes" in error and "log.txt" in error
    a_list(rows, 300)
    assert "was started with fingerprint=" in refusal(capsys, rows, out)
    a_list(rows, 3)
    assert "image_size=256 (now 384)" in refusal(capsys, rows, out, "--image-size", "384")


def test_without_img2dataset_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.delenv("IMGLISH_DOWNLOAD_PYTHON", raising=False)
    monkeypatch.setenv("IMGLISH_DOWNLOAD_ENV", str(tmp_path))
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"bash launch/env/download\.sh"):
        download.find_python()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert download.find_python() == str(tmp_path / "bin" / "python")
    monkeypatch.setenv("IMGLISH_DOWNLOAD_PYTHON", "/no/such/python")
    with pytest.raises(ValueError, match="IMGLISH_DOWNLOAD_PYTHON=/no/such/python"):
        download.find_python()
