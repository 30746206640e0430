"""data_tools.filter_list: every row of a list is kept, or dropped for one reason, also after kills."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import filter_list as tool
from data_tools.filter_list import filter_list, main, read_domains
from data_tools.lists.filters import ListSettings
from data_tools.lists.parts import Parts, owned_parts
from data_tools.lists.reading import open_list
from data_tools.shards.steps import read_steps
from tests.toys import refused

# caption, similarity, width -> the reason, or None
ROWS = [
    ("a red bicycle on a wall", 0.4, 300, None),
    ("a blue bicycle on a wall", 0.1, 300, "low_similarity"),
    ("IMG_1234.jpg", 0.1, 300, "low_similarity"),  # the first filter counts
    ("IMG_1234.jpg", 0.4, 300, "caption_is_filename"),
    ("a tiny bicycle on a wall", 0.4, 30, "too_small"),
    ("a \0 bicycle", 0.4, 300, "nul_byte"),
    (None, 0.4, 300, "empty_caption"),
    ("x" * 10_000_000, 0.4, 300, "long_caption"),
    ("y " * 1500, 0.4, 300, "caption_too_long"),
    ("a green bicycle on a wall", None, 300, "low_similarity"),
    ("a bicycle", 0.4, 300, "caption_too_short"),
]
SETTINGS = ListSettings(min_similarity=0.3, min_side=100, min_caption_words=3, unique_urls=True)


@pytest.fixture
def listed(tmp_path) -> Path:
    """ROWS twice: in the second half, the good row has the URL of an earlier one."""
    path = tmp_path / "list.parquet"
    rows = [
        {"URL": f"http://a.example/{i}.jpg", "TEXT": text, "similarity": score, "WIDTH": width, "HEIGHT": 300}
        for i, (text, score, width, _) in enumerate(ROWS)
    ] * 2
    rows.append({"URL": "file:///etc/passwd", "TEXT": "a good caption", "similarity": 0.4, "WIDTH": 300, "HEIGHT": 300})
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def run(listed: Path, out: Path, *more: str) -> int:
    command = ["--list", str(listed), "--preset", "laion", "--out", str(out), "--min-similarity", "0.3"]
    return main([*command, "--min-side", "100", "--min-caption-words", "3", "--unique-urls", *more])


def filtered(listed: Path, out: Path, part: int = 5, **more) -> tuple:
    return filter_list(open_list([listed], "laion"), SETTINGS, out, [str(listed)], part=part, **more)


def test_every_row_is_kept_or_dropped_under_one_reason(listed, tmp_path, capsys):
    out = tmp_path / "clean" / "kept.parquet"
    assert run(listed, out) == 0
    expected = Counter(reason for *_, reason in ROWS * 2 if reason) + Counter(duplicate_url=1, bad_url=1)
    step = read_steps(tmp_path / "clean")["filter_list"]
    assert step.dropped == expected and step.rows == 23 and step.kept == 1 and step.unit == "rows"
    assert step.settings["min_similarity"] == 0.3 and "watermark" not in step.settings["filters"]
    table = pq.read_table(out)
    assert table.column_names == ["row", "url", "caption", "similarity", "width", "height"]
    assert table["row"].to_pylist() == [0]
    dropped = pq.read_table(tmp_path / "clean" / "dropped" / "kept.parquet").to_pylist()
    assert sorted(line["row"] for line in dropped) == list(range(1, 23))
    assert {"row": 4, "url": "http://a.example/4.jpg", "reason": "too_small", "detail": "30 x 300"} in dropped
    reasons = [(row, reason) for row, (*_, reason) in enumerate(ROWS * 2) if reason]
    assert {line["row"]: line["reason"] for line in dropped} == dict([*reasons, (11, "duplicate_url"), (22, "bad_url")])
    printed = capsys.readouterr().out
    assert "low_similarity" in printed and "26.09 %" in printed


def test_a_url_is_kept_once_though_its_first_row_was_dropped(tmp_path):
    path = tmp_path / "list.parquet"
    captions = ["IMG_1.jpg", "a good caption", "another good caption"]
    pq.write_table(pa.table({"url": ["http://a.example/b"] * 3, "caption": captions}), path)
    step, _ = filter_list(open_list([path], "laion"), SETTINGS_URLS, tmp_path / "o" / "kept.parquet", [str(path)])
    assert step.dropped == {"caption_is_filename": 1, "duplicate_url": 1}
    assert pq.read_table(tmp_path / "o" / "kept.parquet")["caption"].to_pylist() == ["a good caption"]


SETTINGS_URLS = ListSettings(unique_urls=True)


@pytest.mark.parametrize("name", ["kept.parquet", "kept"])
def test_a_killed_run_continues_with_the_same_result(listed, tmp_path, name, monkeypatch):
    def rows(out: Path) -> list:
        paths = [out] if out.is_file() else sorted(out.glob("*.parquet"))
        return [row for path in paths for row in pq.read_table(path).to_pylist()]

    whole = tmp_path / "whole" / name
    filtered(listed, whole)
    out, done = tmp_path / "killed" / name, []
    original = Parts.write

    def write(self, part, *more):
        if len(done) in (1, 3):
            done.append("killed")
            raise KeyboardInterrupt
        done.append(part)
        return original(self, part, *more)

    monkeypatch.setattr(Parts, "write", write)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            filtered(listed, out)
    step, new = filtered(listed, out)
    assert new and done == [0, "killed", 1, "killed", 2, 3, 4]
    assert rows(out) == rows(whole)
    homes = [path if name == "kept" else path.parent for path in (whole, out)]
    assert step.dropped == read_steps(homes[0])["filter_list"].dropped
    dropped = [pq.read_table(next(home.glob("dropped/*.parquet"))).to_pylist() for home in homes]
    assert dropped[0] == dropped[1]
    assert not [path for path in homes[1].iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["kept.parquet", "kept"])
def test_a_run_killed_at_its_very_end_continues(listed, tmp_path, name, monkeypatch):
    out = tmp_path / "o" / name
    with monkeypatch.context() as patch:
        patch.setattr(tool, "write_step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            filtered(listed, out)
    step, new = filtered(listed, out)
    assert new and step.rows == 23
    filtered(listed, out, 9, overwrite=True)
    assert name == "kept.parquet" or len(list(out.glob("*.parquet"))) == 3


def test_a_list_of_which_nothing_remains_is_an_error(listed, tmp_path, capsys):
    out = tmp_path / "clean" / "kept.parquet"
    for _ in range(2):
        error = refused(capsys, main, "--list", listed, "--preset", "laion", "--out", out, "--max-caption-chars", "5")
        assert "all 23 rows are dropped (caption_too_long 16, " in error
        assert f"{tmp_path / 'clean' / 'dropped' / 'kept.parquet'} says why" in error
        step = read_steps(tmp_path / "clean")["filter_list"]
        assert (step.rows, step.kept) == (23, 0) and step.dropped["nul_byte"] == 2 and out.exists()


def test_a_second_call_does_nothing_and_other_thresholds_are_refused(listed, tmp_path, capsys):
    out = tmp_path / "clean" / "kept.parquet"
    assert run(listed, out) == 0
    before = out.stat().st_mtime_ns
    assert run(listed, out) == 0 and "complete already" in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before
    assert run(listed, out, "--max-aspect", "2") == 2
    assert "thresholds; choose another --out, or --overwrite" in capsys.readouterr().err
    assert run(listed, out.with_name("other.parquet")) == 2
    assert "give each its own directory" in capsys.readouterr().err
    assert run(listed, out, "--max-aspect", "2", "--overwrite") == 0


def test_work_with_other_thresholds_is_not_continued(listed, tmp_path, monkeypatch):
    out = tmp_path / "clean" / "kept.parquet"
    monkeypatch.setattr(Parts, "publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(listed, out) == 130
    assert run(listed, out, "--max-aspect", "2") == 2
    assert not out.exists()


def test_a_second_process_is_refused(listed, tmp_path, capsys):
    with owned_parts(tmp_path / "kept.parquet", {}, overwrite=True):
        assert run(listed, tmp_path / "kept.parquet", "--overwrite") == 2
    assert "is writing to" in capsys.readouterr().err


def test_errors_are_sentences(listed, tmp_path, capsys):
    assert run(listed, tmp_path / "a" / "b.parquet", "--max-punsafe", "0.1") == 2
    assert "--max-punsafe needs the column punsafe, but the list has row, url, caption, sim" in capsys.readouterr().err
    assert run(tmp_path / "none.parquet", tmp_path / "a" / "b.parquet") == 2
    assert capsys.readouterr().err.startswith("error: ")
    domains = tmp_path / "domains.txt"
    domains.write_text("https://a.example/b\n")
    assert run(listed, tmp_path / "a" / "b.parquet", "--blocked-domains", str(domains)) == 2
    assert "line 1 of" in capsys.readouterr().err


def test_the_file_of_domains_is_read_with_comments(tmp_path):
    path = tmp_path / "domains.txt"
    path.write_text("# bad ones\nB.example\n*.c.example # all of it\n\nb.example\n")
    assert read_domains(path) == ("b.example", "c.example")


def test_a_list_of_pictures_alone_is_not_junk(tmp_path):
    path = tmp_path / "list.parquet"
    pq.write_table(pa.table({"url": ["http://a.example/b", "http://a.example/c"]}), path)
    out = tmp_path / "o" / "kept.parquet"
    rows = open_list([path], "generic", "url")
    step, _ = filter_list(rows, ListSettings(), out, [str(path)])
    assert step.kept == 2
    assert json.loads((tmp_path / "o" / "steps" / "filter_list.json").read_text())["rows"] == 2
