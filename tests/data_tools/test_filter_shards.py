"""data_tools.filter_shards: names the samples to drop, in order, and changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data_tools import filter_shards as tool
from data_tools.filter_shards import filter_shards, main
from data_tools.pictures.filters import PictureSettings
from data_tools.sample_corpus import Corpus, write_corpus
from data_tools.shards.steps import read_drops, read_steps
from tests import toys
from tests.data_tools.pictures import write_shard
from tests.toys import encoded, refused


def picture(seed: int, height: int = 100, width: int = 120) -> bytes:
    return encoded(toys.picture(seed, height, width))


def write(directory: Path, samples: list[tuple[bytes | None, str | None]]) -> Path:
    """Four samples per shard."""
    keyed = [(f"s{number:03d}", *sample) for number, sample in enumerate(samples)]
    for start in range(0, len(keyed), 4):
        write_shard(directory, start // 4, keyed[start : start + 4])
    return directory


@pytest.fixture
def directory(tmp_path) -> Path:
    samples = [
        (picture(0), "a cat"),
        (picture(1, 20, 20), "a cat"),
        (encoded(Image.new("RGB", (100, 100), "red")), "a cat"),
        (picture(2)[:700], "a cat"),
        (None, "a text alone"),
        (picture(3), "A  cat!"),
        (picture(4), "a cat"),
        (picture(5), None),
        (picture(6), "a dog"),
    ]
    return write(tmp_path / "shards", samples)


def drops(directory: Path) -> list[tuple[str, ...]]:
    return [tuple(drop) for drop in read_drops([directory / "drops" / "filter_shards.parquet"])]


def test_each_bad_sample_is_named_once_with_its_value(directory, capsys):
    tars = {path: path.read_bytes() for path in directory.glob("*.tar")}
    assert main([str(directory), "--max-caption-repeats", "2", "--workers", "2"]) == 0
    dropped = drops(directory)
    assert [line[:3] for line in dropped] == [
        ("00000", "s001", "too_small"),
        ("00000", "s002", "blank"),
        ("00000", "s003", "undecodable"),
        ("00001", "s006", "caption_repeats"),  # the third that passes; case and punctuation are ignored
    ]
    assert dropped[0][3] == "20 x 20" and dropped[1][3].startswith("contrast 0") and dropped[3][3] == "under 3 pictures"
    step = read_steps(directory)["filter_shards"]
    assert (step.rows, step.kept) == (9, 5) and step.settings["max_caption_repeats"] == 2
    assert list(step.dropped) == ["undecodable", "too_small", "blank", "caption_repeats"]
    assert {path: path.read_bytes() for path in directory.glob("*.tar")} == tars
    assert "8 pictures measured" in capsys.readouterr().out


def test_a_new_tar_is_measured_again_and_other_thresholds_need_no_measuring(directory, monkeypatch):
    filter_shards(directory, PictureSettings())
    looked: list[Path] = []
    original = tool._measure_shard
    monkeypatch.setattr(tool, "_measure_shard", lambda tar: looked.append(tar) or original(tar))
    step, measured = filter_shards(directory, PictureSettings(min_side=101))
    assert not looked and measured.pictures == 0 and step.dropped["too_small"] == 7
    write(directory, [(picture(9), "new")])
    step, _ = filter_shards(directory, PictureSettings())
    assert [path.name for path in looked] == ["00000.tar"] and step.rows == 1 + 5


def test_a_killed_run_continues_with_the_same_result(directory, monkeypatch):
    filter_shards(directory, PictureSettings())
    expected = drops(directory)
    for path in [*directory.glob("measures/*"), *directory.glob("drops/*")]:
        path.unlink()
    original = tool._measure_shard

    def measured(tar: Path):
        if tar.stem == "00001":
            raise KeyboardInterrupt
        return original(tar)

    monkeypatch.setattr(tool, "_measure_shard", measured)
    assert main([str(directory), "--workers", "1"]) == 130
    assert [path.name for path in directory.glob("measures/*")] == ["00000.parquet"] and not drops_there(directory)
    (directory / "measures" / "00000.parquet").write_bytes(b"cut short")  # will be measured again
    monkeypatch.undo()
    filter_shards(directory, PictureSettings())
    assert drops(directory) == expected


def drops_there(directory: Path) -> bool:
    return (directory / "drops" / "filter_shards.parquet").exists()


def test_drawn_scenes_pass(tmp_path):
    write_corpus(tmp_path / "c", Corpus(pairs=60, images=0, texts=0, held_out=2, familiar=0), workers=1)
    step, _ = filter_shards(tmp_path / "c" / "pairs" / "train", PictureSettings())
    assert step.kept == step.rows == 60


def test_errors_are_sentences(directory, tmp_path, capsys):
    assert "is not a directory" in refused(capsys, main, tmp_path / "none")
    error = refused(capsys, main, directory, "--max-aspect", "0.5")
    assert error == "error: --max-aspect=0.5 is out of range; use 1 (squares only) or more, such as 3\n"
