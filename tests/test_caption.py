"""pretrain.caption: shards and folders to JSON lines, kills and parts, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pretrain
from pretrain.caption import main
from pretrain.models.generation import Writing
from tests.test_embed import folder, shards  # noqa: F401, the fixtures
from tests.test_pretrained import fusion, stage, task  # noqa: F401, the fixtures
from tests.toys import pair_sample, refused


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]


def test_shards_are_captioned_once_whatever_the_batches_and_parts(fusion, shards, tmp_path, capsys):  # noqa: F811
    place = str(fusion[0])
    line = [place, str(shards), "--max-words", "6"]
    assert main([*line, "--out", str(tmp_path / "c"), "--batch", "3"]) == 0
    assert "7 pictures in 2 files, 1 left out; 0 files were there" in capsys.readouterr().out
    made = lines(tmp_path / "c")
    assert [row["key"] for row in made] == ["00", "01", "02", "03", "10", "11", "13"]
    looks = [pair_sample("x", seed)["jpg"] for seed in (0, 1, 2, 3, 10, 11, 13)]
    assert [row["caption"] for row in made] == pretrain.load(place).caption(looks, Writing(max_words=6))
    drawn = [*line, "--top-p", "0.9", "--seed", "3"]
    assert main([*drawn, "--out", str(tmp_path / "d"), "--batch", "3"]) == 0
    for part in ("1/2", "0/2", "0/1"):
        assert main([*drawn, "--out", str(tmp_path / "e"), "--part", part, "--batch", "2"]) == 0
    assert "0 pictures in 0 files, 0 left out; 2 files were there" in capsys.readouterr().out
    assert lines(tmp_path / "d") == lines(tmp_path / "e") != made


def test_a_folder_is_captioned_and_other_settings_need_another_place(fusion, folder, tmp_path, capsys):  # noqa: F811
    line, out = [fusion[0], folder, "--out", tmp_path / "c"], tmp_path / "c"
    assert main([*map(str, line), "--beams", "1"]) == 0
    assert [row["key"] for row in lines(out)] == ["0.jpg", "2.jpg", "deep/1.jpg", "deep/3.jpg"]
    assert "results of other writing; take another --out" in refused(capsys, main, *line)


def test_what_cannot_be_used_is_one_sentence(fusion, stage, folder, tmp_path, capsys):  # noqa: F811
    line = [fusion[0], folder, "--out", tmp_path / "c"]
    assert "top_p=0.9 draws one text" in refused(capsys, main, *line, "--top-p", "0.9", "--beams", "2")
    assert "--seed -1 is negative" in refused(capsys, main, *line, "--seed", "-1")
    assert "max_words=0" in refused(capsys, main, *line, "--max-words", "0")
    assert "have no masked head" in refused(capsys, main, stage, folder, "--out", tmp_path / "c")
    assert not (tmp_path / "c").exists()
