"""data_tools.index: what it writes, what it leaves out, what it refuses, and that it only does what is missing."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from data_tools.index import main
from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.reader import ShardReader, load_manifest


def write_shard(directory: Path, number: int, samples: int, stats: bool = True, first: int = 0) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{number:05d}.tar"
    with tarfile.open(path, "w") as tar:
        for sample in range(first, first + samples):
            for extension in ("jpg", "txt"):
                data = f"{number} {sample} {extension}".encode()
                info = tarfile.TarInfo(f"{number:05d}{sample:04d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    if stats:
        (directory / f"{number:05d}_stats.json").write_text(json.dumps({"successes": samples}))
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    for number in range(3):
        write_shard(tmp_path / "source", number, number + 1)
    return tmp_path / "source"


def test_the_command_makes_a_source_that_training_reads(source, capsys):
    assert main([str(source), "--workers", "2"]) == 0
    assert "3 shards (3 read, the rest up to date), 6 samples" in capsys.readouterr().out
    manifest = load_manifest(str(source))
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [
        ("00000.tar", 1),
        ("00001.tar", 2),
        ("00002.tar", 3),
    ]
    assert ShardReader(manifest).read(2, 1) == {"__key__": b"000020001", "jpg": b"2 1 jpg", "txt": b"2 1 txt"}
    assert not list(source.glob("*.tmp")) and not list(source.glob(".*"))


def test_any_number_of_workers_writes_the_same(source):
    written = []
    for workers in (1, 2):
        for path in [*source.glob("*.idx"), *source.glob("manifest.json")]:
            path.unlink()
        index_directory(source, workers=workers)
        written.append({path.name: path.read_bytes() for path in source.iterdir()})
    assert written[0] == written[1]


def test_only_what_changed_is_read_again(source):
    assert index_directory(source).scanned == 3
    assert index_directory(source).scanned == 0
    write_shard(source, 1, 5)
    write_shard(source, 3, 1)
    (source / "00002.idx").write_bytes(b"damaged")
    result = index_directory(source)
    assert (result.scanned, result.manifest.counts) == (3, [1, 5, 3, 1])
    (source / "00000.tar").unlink()
    assert index_directory(source).manifest.counts == [5, 3, 1]
    (source / "manifest.json").write_text("damaged")
    assert index_directory(source).manifest.counts == [5, 3, 1]


def test_a_shard_that_is_newer_than_its_index_is_read_again_though_its_size_is_the_same(source):
    index_directory(source)
    size = (source / "00002.tar").stat().st_size
    path = write_shard(source, 2, 3, first=4)
    assert path.stat().st_size == size
    os.utime(path, (path.stat().st_mtime + 10,) * 2)
    index_directory(source)
    assert ShardReader(load_manifest(str(source))).read(2, 2)["__key__"] == b"000020006"


def test_partial_shards_are_left_out_and_named(source, capsys):
    path = write_shard(source, 7, 4, stats=False)
    os.truncate(path, 700)  # as a killed download leaves it
    assert main([str(source)]) == 0
    assert "left out: 00007.tar: partial, it has no 00007_stats.json" in capsys.readouterr().err
    assert load_manifest(str(source)).counts == [1, 2, 3]


def test_without_any_stats_every_tar_counts(tmp_path):
    for number in range(2):
        write_shard(tmp_path, number, 2, stats=False)
    assert index_directory(tmp_path).manifest.counts == [2, 2]


def test_a_broken_shard_stops_it_or_is_left_out_if_one_says_so(source, capsys):
    os.truncate(source / "00001.tar", 700)
    assert main([str(source)]) == 2
    error = capsys.readouterr().err
    assert f"error: {source}/00001.tar is" in error and "700" in error and "--skip-broken" in error
    assert "Traceback" not in error
    assert not (source / "manifest.json").exists()
    assert main([str(source), "--skip-broken"]) == 0
    assert "left out: 00001.tar" in capsys.readouterr().err
    assert load_manifest(str(source)).counts == [1, 3]


def test_a_shard_without_samples_is_no_error_but_a_source_without_any_is(source, tmp_path, capsys):
    write_shard(source, 0, 0)
    assert index_directory(source).manifest.counts == [0, 2, 3]
    with tarfile.open(tmp_path / "empty.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("a.gif"))
    assert main([str(tmp_path)]) == 2
    assert "hold no sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "is not a directory"),
        (lambda path: path.write_text("file"), "is not a directory"),
        (lambda path: path.mkdir(), "holds no .tar file"),
        (lambda path: (write_shard(path, 0, 1, stats=False), (path / "00009_stats.json").touch()), "all are partial"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, make, words):
    make(tmp_path / "input")
    assert main([str(tmp_path / "input")]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_several_directories_in_one_call(source, tmp_path):
    write_shard(tmp_path / "second", 0, 4)
    assert main([str(source), str(tmp_path / "second")]) == 0
    assert load_manifest((str(source), str(tmp_path / "second"))).counts == [1, 2, 3, 4]
