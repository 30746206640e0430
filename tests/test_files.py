"""pretrain.files: a file is old or new and never half, readable by whom the umask says, and leftovers are swept."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from pretrain.checkpoint.directory import complete
from pretrain.files import beside, move, sweep, write_file, write_json, written_in_one_step
from pretrain.metrics import read_metrics
from pretrain.report.rows import _read_object
from pretrain.run.directory import read_json


def test_json_that_is_nested_too_deeply_is_damaged_json_to_every_reader(tmp_path):
    deep = tmp_path / "step_00000001" / "MANIFEST.json"
    deep.parent.mkdir()
    deep.write_text("[" * 100_000)
    assert list(complete(tmp_path)) == [] and read_json(deep) == {}
    notes: list[str] = []
    assert _read_object(deep, notes) == {} and "nested more than" in notes[0]
    deep.write_text("[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        read_metrics(deep)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "manifest.json"
    write_file(target, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not be written: No space.*manifest\.json"):
        write_file(target, b"new")
    with pytest.raises(OSError, match="No space"), written_in_one_step(target) as growing:
        growing.write_bytes(b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_killed_at_any_moment_the_file_is_old_or_new(tmp_path, monkeypatch, call):
    class Killed(BaseException):
        pass

    real, target = getattr(os, call), tmp_path / "a"
    for moment in range(1, 4):
        write_file(target, b"old")
        calls = []

        def dying(*args, calls=calls, moment=moment):
            calls.append(args)
            if len(calls) == moment:
                raise Killed
            real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, dying)
            patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
            with contextlib.suppress(Killed):
                write_file(target, b"new")
        assert target.read_bytes() in (b"old", b"new")
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


def test_the_umask_decides_who_may_read(tmp_path):
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a", {})
        with written_in_one_step(tmp_path / "b") as growing:  # as libraries do that write through a temporary file
            (tmp_path / "c").touch(0o600)
            os.replace(tmp_path / "c", growing)
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "ab"] == [0o640, 0o640]


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path):
    beside(tmp_path / "file").touch()  # as an earlier version left it
    beside(tmp_path / "folder").mkdir()
    (beside(tmp_path / "folder") / ".tmp123").touch()
    for name in ("file", "folder"):
        with written_in_one_step(tmp_path / name) as growing:
            growing.write_text("new")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_directory_takes_its_place(tmp_path):
    growing = beside(tmp_path / "list")
    growing.mkdir()
    (growing / "a").touch()
    move(growing, tmp_path / "list")
    assert os.listdir(tmp_path) == ["list"] and os.listdir(tmp_path / "list") == ["a"]


def test_leftovers_of_every_version_are_swept(tmp_path):
    beside(tmp_path / "00000.tar", "7").touch()
    beside(tmp_path / "weights").mkdir()
    for name in (".manifest.json.x7.tmp", "mine.tmp"):
        (tmp_path / name).touch()
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["mine.tmp"]
