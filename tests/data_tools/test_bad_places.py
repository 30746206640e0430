"""What can happen to any tool on shards: huge captions, NUL bytes, a repeated key, a full disk, a killed worker."""

from __future__ import annotations

import importlib
import io
import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import filter_list, rewrite
from data_tools.shards.steps import read_steps
from pretrain.data.shards.reader import MAX_TEXT_BYTES, load_manifest
from tests.data_tools.pictures import scenes
from tests.toys import encoded, index_source, pair_sample, write_shard, write_source

WRITERS = ("index", "filter_shards", "dedup", "leaks", "rewrite", "audit")


@pytest.fixture
def evaluation(tmp_path) -> Path:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "a.jpg").write_bytes(encoded(scenes(1)[0]))
    return tmp_path / "evaluation"


def run(
    tool: str, shards: Path, evaluation: Path, workers: int = 1, more: Sequence[str] = (), out: Path | None = None
) -> int:
    out = out or shards.parent
    own = {
        "leaks": ["--against", f"heldout={evaluation}"],
        "rewrite": ["--out", str(out / "clean")],
        "audit": ["--out", str(out / "audit.html")],
    }
    arguments = [str(shards), "--workers", str(workers), *own.get(tool, []), *more]
    return importlib.import_module(f"data_tools.{tool}").main(arguments)


def test_hostile_captions_and_keys(tmp_path, evaluation, capsys):
    """Of eight samples one is replaced by a later one with its name, and one has more text than the limit."""
    texts = {"good": "a plain caption", "nul": "a\0b", "10 MB": "x" * 10_000_000, "<b>": "a caption\n\n"}
    texts["long"] = "y" * (MAX_TEXT_BYTES + 1)
    samples = [pair_sample(key, number, text) for number, (key, text) in enumerate(texts.items())]
    samples += [pair_sample("twice", 10, "first"), pair_sample("good-1", 11, "y"), pair_sample("twice", 12, "second")]
    shards = tmp_path / "shards"
    write_shard(shards, 0, samples)
    index_source(shards)
    for tool in ("filter_shards", "dedup", "leaks", "audit"):
        assert run(tool, shards, evaluation, more=["--min-side", "16"] if tool == "filter_shards" else []) == 0
        if tool != "audit":
            step = read_steps(shards)[tool]
            assert (step.rows, step.kept) == (7, 7), tool
    assert run("verify", shards, evaluation) == 1
    output = capsys.readouterr().out
    assert f"long\t.txt has {MAX_TEXT_BYTES + 1} bytes" in output and "twice\t.jpg occurs more than once" in output
    assert run("rewrite", shards, evaluation) == 0
    step = read_steps(tmp_path / "clean")["rewrite"]
    assert (step.rows, step.kept) == (8, 6) and step.dropped == {"duplicate_key": 1, "member_too_large": 1}
    assert load_manifest(str(tmp_path / "clean")).samples == 6
    assert run("verify", tmp_path / "clean", evaluation) == 0


@pytest.fixture
def small_disk(mount) -> Path:
    """A small disk with shards; `filled` uses up its free space."""
    disk = mount("2m")
    for number in range(2):
        samples = [pair_sample(f"{number}{place}", 10 * number + place, height=90, width=80) for place in range(6)]
        write_shard(disk / "shards", number, samples)
    return disk


def filled(disk: Path) -> Path:
    """The file that fills the disk; remove it to make room."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return ballast


@pytest.mark.parametrize("tool", WRITERS)
def test_a_full_disk_is_one_sentence_and_loses_nothing(small_disk, evaluation, capsys, tool):
    ballast = filled(small_disk)
    before = {path for path in small_disk.rglob("*") if path.is_file()}
    assert run(tool, small_disk / "shards", evaluation) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error
    seen = {path for path in small_disk.rglob("*") if path.is_file() and path.stat().st_size} - before
    assert not seen, "what is half written must not be seen"
    ballast.unlink()
    assert run(tool, small_disk / "shards", evaluation) == 0


def test_a_filtered_list_on_a_full_disk(small_disk, tmp_path, capsys):
    captions = [f"a caption number {number} of many" for number in range(100)]
    urls = [f"http://a.example/{number}.jpg" for number in range(100)]
    pq.write_table(pa.table({"url": urls, "caption": captions}), tmp_path / "list.parquet")
    line = ["--list", str(tmp_path / "list.parquet"), "--preset", "canonical"]
    line += ["--out", str(small_disk / "kept" / "kept.parquet")]
    ballast = filled(small_disk)
    assert filter_list.main(line) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error
    assert not (small_disk / "kept" / "kept.parquet").exists() and not (small_disk / "kept" / "steps").exists()
    ballast.unlink()
    assert filter_list.main(line) == 0
    assert read_steps(small_disk / "kept")["filter_list"].kept == 100


def test_a_read_only_data_set_names_the_way_out(mount, tmp_path, evaluation, capsys):
    disk, links = mount("2m"), tmp_path / "links"
    write_shard(disk / "shards", 0, [pair_sample(key, number) for number, key in enumerate("ab")])
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for tool in ("index", "filter_shards", "dedup", "leaks", "rewrite"):
        assert run(tool, disk / "shards", evaluation, out=tmp_path) == 2
        error = capsys.readouterr().err
        assert f"{disk / 'shards'} cannot be written to" in error and error.count("\n") == 1, tool
        assert f"mkdir links && ln -s {disk / 'shards'}/* links/" in error
    assert not (tmp_path / "clean").exists()
    links.mkdir()
    for path in (disk / "shards").iterdir():
        (links / path.name).symlink_to(path)
    for tool in WRITERS:
        assert run(tool, links, evaluation) == 0, tool
    # What is indexed can be read where it is.
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    index_source(disk / "shards")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert run("index", disk / "shards", evaluation) == 0
    assert rewrite.main([str(disk / "shards"), "--out", str(tmp_path / "again")]) == 0


def test_directories_that_are_called_like_tars(tmp_path, evaluation, capsys):
    shards = write_source(tmp_path / "set.tar", [[pair_sample("a")]])
    (shards / "x.tar").mkdir()
    assert load_manifest(str(shards)).samples == 1, "a directory of shards may have any name"
    assert run("index", shards, evaluation) == 0 and "skipped: x.tar: it is a directory" in capsys.readouterr().err
    (evaluation / "x.tar").mkdir()
    assert run("leaks", shards, evaluation) == 0, "a folder of pictures may contain one"
    assert run("index", evaluation, evaluation) == 2
    assert f"{evaluation / 'x.tar'} is a directory, not a tar" in capsys.readouterr().err


@pytest.mark.parametrize("tool", WRITERS)
def test_a_truncated_shard_is_named(tmp_path, evaluation, capsys, tool):
    shards = write_source(tmp_path / "shards", [[pair_sample(f"{shard}{n}") for n in range(2)] for shard in range(2)])
    os.truncate(shards / "00001.tar", 1000)
    assert run(tool, shards, evaluation) == 2
    error = capsys.readouterr().err
    assert "00001.tar is truncated at byte 1000" in error and error.count("error: ") == 1 and "Traceback" not in error


@pytest.mark.parametrize("tool", [*WRITERS, "verify"])
def test_a_killed_worker_is_one_sentence_and_loses_nothing(tmp_path, evaluation, monkeypatch, capsys, tool):
    numbers = iter(range(100))
    write_source(
        tmp_path / "shards",
        [[pair_sample(f"{shard}{n}", next(numbers), height=90, width=80) for n in range(3)] for shard in range(3)],
    )
    if tool == "index":
        for path in (tmp_path / "shards").glob("*.idx"):
            path.unlink()
    master = os.getpid()

    def deadly(function):
        def in_a_worker(*arguments, **options):
            if os.getpid() != master:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return in_a_worker

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", deadly(os.stat))
        patched.setattr(io, "open", deadly(io.open))
        assert run(tool, tmp_path / "shards", evaluation, workers=2) == 2
    error = capsys.readouterr().err
    assert "error: a worker process was killed" in error and "Traceback" not in error
    assert not (tmp_path / "shards" / "drops").exists()
    assert run(tool, tmp_path / "shards", evaluation, workers=2) == 0
