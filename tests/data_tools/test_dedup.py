"""data_tools.dedup: what is there twice is named once, whatever the order of files, workers and directories."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from data_tools import dedup
from data_tools.dedup import main
from data_tools.shards.steps import Drop, read_drops, read_steps, write_drops
from tests.data_tools.pictures import COPIES, scenes, write_shard
from tests.toys import encoded, refused


def drops(directory) -> list[Drop]:
    return list(read_drops([directory / "drops" / "dedup.parquet"]))


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [encoded(picture, quality=90) for picture in scenes(30, seed=7)]


def test_each_copy_is_dropped_for_the_largest(tmp_path, pictures, capsys):
    originals = scenes(30, seed=7)
    copies = list(COPIES)
    write_shard(tmp_path, 0, [(f"o{n:02d}", data, "x") for n, data in enumerate(pictures)])
    write_shard(tmp_path, 1, [(f"c{n:02d}", COPIES[copies[n % 10]](originals[n]), "y") for n in range(30)])
    assert main([str(tmp_path), "--workers", "1"]) == 0
    found = drops(tmp_path)
    right = [drop for drop in found if drop.key[1:] == drop.detail.split()[0][-2:]]
    assert len(right) >= 25 and len(found) - len(right) <= 2
    assert {drop.reason for drop in found} == {"near_duplicate"}
    # "larger" copies win, all others lose against the original.
    for drop in right:
        enlarged = copies[int(drop.key[1:]) % 10] == "larger"
        assert drop.shard == ("00000" if enlarged else "00001"), drop
        assert f"{tmp_path}/{'00001' if enlarged else '00000'}/" in drop.detail and "distance=" in drop.detail
    step = read_steps(tmp_path)["dedup"]
    assert step.rows == 60 and step.kept == 60 - len(found) and step.settings["distance"] == 4
    assert f"{len(found):,}" in capsys.readouterr().out


def test_equal_bytes_are_exact_duplicates_of_the_first(tmp_path, pictures):
    write_shard(tmp_path, 0, [("b", pictures[0], "one"), ("a", pictures[0], "two"), ("c", pictures[1], "three")])
    write_shard(tmp_path, 1, [("d", pictures[0], None), ("e", None, "text"), ("f", None, "text")])
    assert main([str(tmp_path), "--exact-only"]) == 0
    first = f"{tmp_path}/00000/a"
    assert drops(tmp_path) == [
        Drop("00000", "b", "exact_duplicate", first),
        Drop("00001", "d", "exact_duplicate", first),
    ]


def test_an_exact_duplicate_of_a_near_duplicate_goes_for_the_one_that_stays(tmp_path):
    picture = scenes(1)[0]
    large, small = encoded(picture, quality=95), COPIES["half"](picture)
    write_shard(tmp_path, 0, [("a", small, None), ("b", small, None), ("c", large, None)])
    assert main([str(tmp_path)]) == 0
    assert [(drop.key, drop.reason) for drop in drops(tmp_path)] == [("a", "near_duplicate"), ("b", "near_duplicate")]
    assert all(drop.detail.startswith(f"{tmp_path}/00000/c distance=") for drop in drops(tmp_path))


def test_neither_order_nor_workers_nor_shards_matter(tmp_path, pictures):
    samples = [(f"{n:02d}", data, None) for n, data in enumerate(pictures)]
    samples += [(f"{n + 30:02d}", COPIES["half"](picture), None) for n, picture in enumerate(scenes(30, seed=7))]
    results = []
    for name, workers in (("one", 1), ("two", 2)):
        directory = tmp_path / name
        for number in range(3):
            part = samples[number * 20 : number * 20 + 20]
            random.Random(name).shuffle(part)
            write_shard(directory, number, part)
        assert main([str(directory), "--workers", str(workers)]) == 0
        results.append([drop._replace(detail=drop.detail.replace(str(directory), "")) for drop in drops(directory)])
    assert results[0] == results[1] and len(results[0]) >= 28


def test_the_first_directory_has_priority(tmp_path, pictures):
    one, two = tmp_path / "one", tmp_path / "two"
    write_shard(one, 0, [("a", COPIES["half"](scenes(1, seed=7)[0]), None)])
    write_shard(two, 0, [("a", pictures[0], None), ("b", pictures[1], None)])
    assert main([str(one), str(two)]) == 0
    assert drops(one) == [] and [drop.key for drop in drops(two)] == ["a"]
    assert main([str(two), str(one)]) == 0
    assert [drop.key for drop in drops(one)] == ["a"] and drops(two) == []


def test_blank_pictures_are_duplicates_only_if_their_bytes_are(tmp_path):
    blanks = [encoded(Image.new("RGB", (64, 64), (250 - n, 250, 250))) for n in range(4)]
    write_shard(tmp_path, 0, [*((f"a{n}", data, None) for n, data in enumerate(blanks)), ("b", blanks[0], None)])
    assert main([str(tmp_path)]) == 0
    assert [(drop.key, drop.reason) for drop in drops(tmp_path)] == [("b", "exact_duplicate")]


def test_nothing_is_dropped_for_a_sample_that_goes_too(tmp_path, pictures, capsys):
    write_shard(tmp_path, 0, [("a", pictures[0], None), ("b", pictures[0], None), ("c", pictures[0], None)])
    write_drops(tmp_path / "drops" / "filter_shards.parquet", [Drop("00000", "a", "repeated_caption")])
    assert main([str(tmp_path)]) == 0
    assert drops(tmp_path) == [Drop("00000", "c", "exact_duplicate", f"{tmp_path}/00000/b")]
    assert read_steps(tmp_path)["dedup"].rows == 2
    assert "1 samples that other files in drops/ name" in capsys.readouterr().out


def test_a_killed_run_goes_on(tmp_path, pictures, monkeypatch, capsys):
    for number in range(2):
        write_shard(tmp_path, number, [(f"{number}", pictures[number], None)])
    calls = []

    def stop(*args, **options):
        calls.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr(dedup, "find_duplicates", stop)
    assert main([str(tmp_path)]) == 130 and calls
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "drops").exists()
    assert len(list((tmp_path / "hashes").glob("*.parquet"))) == 2
    monkeypatch.undo()
    assert main([str(tmp_path)]) == 0 and drops(tmp_path) == []


def test_the_pairs_are_shown(tmp_path, pictures):
    copy = COPIES["half"](scenes(1, seed=7)[0])
    write_shard(tmp_path, 0, [("a", pictures[0], None), ("b", copy, None)])
    assert main([str(tmp_path), "--show", str(tmp_path / "pairs.png")]) == 0
    sheet = Image.open(tmp_path / "pairs.png").convert("RGB")
    cells = sheet.crop((0, 14, 128, 142)), sheet.crop((130, 14, 258, 142))
    expected = scenes(1, seed=7)[0].resize((128, 128), Image.Resampling.BOX)
    for cell in cells:
        apart = [abs(a - b) for a, b in zip(cell.tobytes(), expected.convert("RGB").tobytes(), strict=True)]
        assert sum(apart) / len(apart) < 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "none is not a directory"),
        (["{tmp}"], "holds no .tar file"),
        (["{tmp}/shards", "{tmp}/shards/"], "is given twice"),
        (["{tmp}/shards", "--distance", "17"], "--distance=17 is wrong"),
        (["{tmp}/shards", "--show", "x.html"], "use x.png"),
    ],
)
def test_a_users_mistake_is_one_sentence(tmp_path, pictures, capsys, arguments, message):
    write_shard(tmp_path / "shards", 0, [("a", pictures[0], None)])
    assert message in refused(capsys, main, *(argument.format(tmp=tmp_path) for argument in arguments))
