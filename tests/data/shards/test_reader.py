"""Reads samples by number; shards that changed or vanished after indexing."""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import signal

import pytest

from pretrain.data.shards import open_files
from pretrain.data.shards import reader as reader_module
from pretrain.data.shards.reader import BadSample, Manifest, ShardError, ShardReader, load_manifest
from tests.toys import read_all, write_tar


def test_samples_are_read_by_number(source):
    reader = ShardReader(load_manifest(str(source)))
    key = b"000020001"
    assert reader.read(2, 1) == {"__key__": key, "jpg": (b"picture " + key) * 300, "txt": key, "json": b"{}"}
    assert reader.read(2, 1, wanted=("txt",)) == {"__key__": key, "txt": key}
    assert len(read_all(reader)) == 6


def test_few_files_stay_open_and_a_pickled_reader_opens_its_own(source, monkeypatch):
    monkeypatch.setattr(open_files, "MOST", 2)
    reader = ShardReader(load_manifest(str(source)))
    before = len(os.listdir("/proc/self/fd"))
    everything = read_all(reader)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    assert read_all(pickle.loads(pickle.dumps(reader))) == everything
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert read_all(reader) == everything


def test_running_out_of_descriptors_is_not_blamed_on_the_shards(source):
    reader = ShardReader(load_manifest(str(source)))
    everything = read_all(reader)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptors = [os.open(os.devnull, os.O_RDONLY)]
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, hard))
        with contextlib.suppress(OSError):  # too many open files
            while True:
                descriptors.append(os.open(os.devnull, os.O_RDONLY))
        os.close(descriptors.pop())
        reader._open.popitem()  # two shards are open, and one descriptor is free but the third shard needs two
        assert read_all(reader) == everything
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for handle in descriptors:
            os.close(handle)


def test_a_shard_that_changed_after_indexing_is_named(source):
    manifest = load_manifest(str(source))
    write_tar(source / "00000.tar", {"a.jpg": b"x" * 20_000})
    os.truncate(source / "00001.tar", 1024)
    (source / "00002.tar").unlink()
    reader = ShardReader(manifest)
    for shard in (0, 1):
        with pytest.raises(ShardError, match=rf"0000{shard}.tar has \d+ bytes.*run python -m data_tools.index again"):
            reader.read(shard, 0)
    with pytest.raises(ShardError, match=r"cannot read .*00002.tar \(No such file"):
        reader.read(2, 0)


def test_an_index_of_another_shard_is_refused(source):
    manifest = load_manifest(str(source))
    (source / "00001.idx").write_bytes((source / "00002.idx").read_bytes())
    (source / "00002.idx").unlink()
    reader = ShardReader(manifest)
    with pytest.raises(ShardError, match=r"00001.idx is not the index that the manifest names"):
        reader.read(1, 0)
    with pytest.raises(ShardError, match=r"cannot read .*00002.idx"):
        reader.read(2, 0)


def test_an_index_of_another_shard_is_refused_where_the_manifest_has_no_hashes(source):
    shards = load_manifest(str(source)).shards
    (source / "00001.idx").write_bytes((source / "00002.idx").read_bytes())
    (source / "00000.idx").write_bytes(b"v1.2 1\njpg 999999 10 a.jpg\n")
    reader = ShardReader(Manifest(tuple(shard._replace(sha256="", index_sha256="") for shard in shards)))
    with pytest.raises(ShardError, match="has 3 samples, its manifest has 2"):
        reader.read(1, 0)
    with pytest.raises(ShardError, match=r"00000.tar ends before a.jpg"):
        reader.read(0, 0)


def test_a_member_that_is_too_large_is_a_bad_sample(source, monkeypatch):
    monkeypatch.setattr(reader_module, "MAX_IMAGE_BYTES", 1000)
    reader = ShardReader(load_manifest(str(source)))
    with pytest.raises(BadSample, match=r"000000000.jpg in .*00000.tar has 5100 bytes; the limit is 1000"):
        reader.read(0, 0)
    assert reader.read(0, 0, wanted=("txt",))["txt"] == b"000000000"


def test_remote_shards_need_a_cache(source):
    with pytest.raises(ValueError, match=r"loading.cache_dir is not set"):
        ShardReader(load_manifest(f"pipe:cat {source}/*.tar"))


@pytest.mark.parametrize("name", ["00001.tar", "00001.idx", "manifest.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(source, name):
    (source / name).unlink()
    os.mkfifo(source / name)

    def waited(*_):
        raise AssertionError("it waits for a writer")

    signal.signal(signal.SIGALRM, waited)
    signal.alarm(5)
    try:
        with pytest.raises(ValueError, match=rf"{name} is a named pipe, not a regular file"):
            read_all(source)
    finally:
        signal.alarm(0)
