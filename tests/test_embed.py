"""pretrain.embed and pretrain.search: shards and folders to vectors, kills and parts, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import pretrain
from pretrain import portions
from pretrain.embed import main, read_vectors
from pretrain.search import main as search_main
from tests.test_pretrained import pictures, stage, task  # noqa: F401, the fixtures
from tests.toys import pair_sample, refused, write_source


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    samples = [[pair_sample(f"{shard}{n}", 10 * shard + n) for n in range(4)] for shard in range(2)]
    samples[1][2] = {"key": "bad", "jpg": b"no picture", "txt": b"text"}
    return write_source(tmp_path / "shards", samples)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for number, data in enumerate(pictures(4)):
        (tmp_path / "pictures" / ("deep" if number % 2 else ".") / f"{number}.jpg").write_bytes(data)
    (tmp_path / "pictures" / "broken.PNG").write_bytes(b"no picture")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture either")
    return tmp_path / "pictures"


def test_shards_become_vectors_with_their_captions(stage, shards, tmp_path, capsys):  # noqa: F811
    assert main([str(stage), str(shards), "--out", str(tmp_path / "v"), "--batch", "3"]) == 0
    out = capsys.readouterr()
    assert "7 pictures in 2 files, 1 left out; 0 files were there" in out.out
    assert "left out: bad: not a readable JPEG" in out.err
    table, vectors = read_vectors(tmp_path / "v")
    assert table.column("key").to_pylist() == ["00", "01", "02", "03", "10", "11", "13"]
    assert table.column("sample").to_pylist() == [0, 1, 2, 3, 0, 1, 3]
    model = pretrain.load(stage)
    looks = [pair_sample("x", seed)["jpg"] for seed in (0, 1, 2, 3, 10, 11, 13)]
    np.testing.assert_allclose(vectors, model.embed_images(looks).numpy(), atol=1e-6)
    texts = np.array(table.column("text").to_pylist())
    np.testing.assert_allclose(texts, model.embed_texts(table.column("caption").to_pylist()).numpy(), atol=1e-6)


def test_parts_and_restarts_do_each_file_once(stage, shards, tmp_path, capsys):  # noqa: F811
    line = [str(stage), str(shards), "--out", str(tmp_path / "v")]
    assert main([*line, "--part", "1/2"]) == 0
    assert [path.name for path in sorted((tmp_path / "v").glob("*.parquet"))] == ["00001.parquet"]
    first = (tmp_path / "v" / "00001.parquet").read_bytes()
    assert main(line) == 0 and "4 pictures in 1 files, 0 left out; 1 files were there" in capsys.readouterr().out
    assert (tmp_path / "v" / "00001.parquet").read_bytes() == first
    (tmp_path / "v" / "00000.parquet").unlink()
    before = pq.read_table(tmp_path / "v" / "00001.parquet")
    assert main(line) == 0 and pq.read_table(tmp_path / "v" / "00001.parquet").equals(before)


def test_a_folder_is_embedded_and_searched(stage, folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(portions, "PER_FILE", 2)
    assert main([str(stage), str(folder), "--out", str(tmp_path / "v")]) == 0
    assert "4 pictures in 3 files, 1 left out" in capsys.readouterr().out
    query = ["--weights", str(stage), "--picture", str(folder / "deep" / "1.jpg"), "a red <b>bus</b>", "-k", "2"]
    assert search_main([str(tmp_path / "v"), *query, "--html", str(tmp_path / "hits.html")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "a red <b>bus</b>" and shown[3] == str(folder / "deep" / "1.jpg")
    assert shown[4] == "  1.000  deep/1.jpg" and len(shown) == 6
    page = (tmp_path / "hits.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and "a red &lt;b&gt;bus" in page and "<b>bus" not in page


def test_shards_are_searched_and_lost_pictures_are_named_so(stage, shards, tmp_path):  # noqa: F811
    assert main([str(stage), str(shards), "--out", str(tmp_path / "v")]) == 0
    (shards / "00001.tar").unlink()
    line = [str(tmp_path / "v"), "--weights", str(stage), "a", "-k", "99", "--html", str(tmp_path / "hits.html")]
    assert search_main(line) == 0
    page = (tmp_path / "hits.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4 and page.count("not there any more") == 3
    assert "picture number 13" in page


def test_other_weights_or_pictures_need_another_place(stage, shards, folder, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "v"
    assert main([str(stage), str(shards), "--out", str(out)]) == 0
    assert "results of other input and digest; take another --out" in refused(capsys, main, stage, folder, "--out", out)
    about = json.loads((out / "embed.json").read_text())
    (out / "embed.json").write_text(json.dumps(about | {"weights": "others"}))
    assert "results of other weights" in refused(capsys, main, stage, shards, "--out", out)
    assert "by other weights" in refused(capsys, search_main, out, "x", "--weights", stage)
    (out / "embed.json").write_text("[" * 100_000)
    assert "cannot be read" in refused(capsys, main, stage, shards, "--out", out)


def test_what_cannot_be_used_is_one_sentence(stage, folder, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "v"
    assert "is not a directory" in refused(capsys, main, stage, tmp_path / "nowhere", "--out", out)
    (tmp_path / "empty").mkdir()
    assert "neither a manifest.json nor a picture" in refused(capsys, main, stage, tmp_path / "empty", "--out", out)
    assert "--part 2/2 is wrong" in refused(capsys, main, stage, folder, "--out", out, "--part", "2/2")
    assert "--batch 0" in refused(capsys, main, stage, folder, "--out", out, "--batch", "0")
    assert "has no embed.json; give the --out" in refused(capsys, search_main, out, "x", "--weights", stage)
    assert "nothing to look for" in refused(capsys, search_main, out, "--weights", stage)
    assert main([str(stage), str(folder), "--out", str(out)]) == 0
    (out / "00000.parquet").write_bytes(b"PAR1")
    assert "is not pretrain.embed's" in refused(capsys, search_main, out, "x", "--weights", stage)
    for path in folder.rglob("*.jpg"):
        path.unlink()
    assert "none of the 1 pictures" in refused_last(capsys, main, stage, folder, "--out", tmp_path / "w")


def refused_last(capsys, main, *arguments: object) -> str:
    """The last line of a refusal that names samples before."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    return capsys.readouterr().err.splitlines()[-1]
