"""data_tools.index: what it writes, skips and refuses, and that it only does what is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_tools.index import main
from data_tools.verify import verify_directory
from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.reader import ShardReader, load_manifest
from tests.toys import numbered_samples, refused, write_shard, write_tar


def write(directory: Path, number: int, samples: int, stats: bool = True, first: int = 0) -> Path:
    return write_shard(directory, number, numbered_samples(number, first + samples, first), stats)


@pytest.fixture
def source(tmp_path) -> Path:
    for number in range(3):
        write(tmp_path / "source", number, number + 1)
    return tmp_path / "source"


def test_the_command_makes_a_source_that_training_reads(source, capsys):
    assert main([str(source), "--workers", "2"]) == 0
    assert "3 shards (3 read, the rest up to date), 6 samples" in capsys.readouterr().out
    manifest = load_manifest(str(source))
    assert [(shard.name, shard.samples) for shard in manifest.shards] == [(f"0000{n}.tar", n + 1) for n in range(3)]
    key = b"000020001"
    members = {"__key__": key, "jpg": (b"picture " + key) * 300, "txt": key, "json": b"{}"}
    assert ShardReader(manifest).read(2, 1) == members
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
    write(source, 1, 5)
    write(source, 3, 1)
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
    path = write(source, 2, 3, first=4)
    assert path.stat().st_size == size
    os.utime(path, (path.stat().st_mtime + 10,) * 2)
    index_directory(source)
    assert ShardReader(load_manifest(str(source))).read(2, 2)["__key__"] == b"000020006"


def test_partial_shards_are_skipped_and_named(source, capsys):
    path = write(source, 7, 4, stats=False)
    os.truncate(path, 700)  # like a killed download
    assert main([str(source)]) == 0
    assert "skipped: 00007.tar: partial, it has no 00007_stats.json" in capsys.readouterr().err
    assert load_manifest(str(source)).counts == [1, 2, 3]


def test_without_any_stats_every_tar_counts(tmp_path):
    for number in range(2):
        write(tmp_path, number, 2, stats=False)
    assert index_directory(tmp_path).manifest.counts == [2, 2]


def test_a_broken_shard_is_an_error_or_skipped_on_request(source, capsys):
    os.truncate(source / "00001.tar", 700)
    error = refused(capsys, main, source)
    assert f"error: {source}/00001.tar is" in error and "700" in error and "--skip-broken" in error
    assert not (source / "manifest.json").exists()
    assert main([str(source), "--skip-broken"]) == 0
    assert "skipped: 00001.tar" in capsys.readouterr().err
    assert load_manifest(str(source)).counts == [1, 3]


def test_a_shard_without_samples_is_fine_but_a_source_without_any_is_an_error(source, tmp_path, capsys):
    write(source, 0, 0)
    assert index_directory(source).manifest.counts == [0, 2, 3]
    write_tar(tmp_path / "empty.tar", {"a.gif": b""})
    assert "contain no sample" in refused(capsys, main, tmp_path)


def test_a_stray_stats_file_makes_nothing_partial(source, capsys):
    """Only a tar whose numbering has other _stats.json files is the rest of a killed download."""
    for path in source.glob("*_stats.json"):
        path.unlink()
    for name in ("00009_stats.json", "dataset_stats.json"):
        (source / name).touch()
    write_shard(source, 5, numbered_samples(5, 1)).rename(source / "train-0.tar")
    assert main([str(source)]) == 0
    assert "skipped: 00009_stats.json: its tar is missing" in capsys.readouterr().err
    assert load_manifest(str(source)).counts == [1, 2, 3, 1]
    assert "00009_stats.json" in [finding.shard for finding in verify_directory(source).findings]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.symlink_to("nowhere.tar"), "is a link to nowhere.tar, which is missing"),
        (os.mkfifo, "is a named pipe, not a regular file"),
    ],
)
@pytest.mark.parametrize("stats", [True, False])
def test_a_tar_that_is_no_file_is_named(source, capsys, make, words, stats):
    make(source / "00005.tar")
    if stats:
        (source / "00005_stats.json").write_text('{"successes": 1}')
    assert f"{source}/00005.tar {words}" in refused(capsys, main, source)
    assert main([str(source), "--skip-broken"]) == 0
    assert words in capsys.readouterr().err and load_manifest(str(source)).counts == [1, 2, 3]
    assert any(f.shard == "00005.tar" and words in f.what for f in verify_directory(source).findings)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "is not a directory"),
        (lambda path: path.write_text("file"), "is not a directory"),
        (lambda path: path.mkdir(), "contains no .tar file"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(tmp_path, capsys, make, words):
    make(tmp_path / "input")
    assert words in refused(capsys, main, tmp_path / "input")


def test_several_directories_in_one_call(source, tmp_path):
    write(tmp_path / "second", 0, 4)
    assert main([str(source), str(tmp_path / "second")]) == 0
    assert load_manifest((str(source), str(tmp_path / "second"))).counts == [1, 2, 3, 4]
