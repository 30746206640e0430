"""What is read is what was indexed: shards, indexes and manifests that changed in between, and those of before."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path

import pytest

from data_tools.verify import verify_directory
from pretrain.data.shards.content import with_checksums
from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.reader import ShardError, ShardReader, load_manifest
from pretrain.data.shards.tar_index import ShardIndex, index_shard
from tests.toys import numbered_samples, read_all, write_shard, write_source, write_tar

COUNT = 40


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source", [numbered_samples(0, COUNT)])


def reordered(directory: Path) -> Path:
    """The same members in another order: the same names, counts and sizes."""
    samples = numbered_samples(0, COUNT)
    return write_shard(directory, 0, [samples[1], samples[0], *samples[2:]])


def another_picture(directory: Path) -> Path:
    """One byte of the first picture."""
    path = directory / "00000.tar"
    with path.open("r+b") as file:
        file.seek(600)
        file.write(b"X")
    return path


def shard_findings(directory: Path) -> list[str]:
    """What `verify` finds about whole shards; the numbered samples are no pictures."""
    return [finding.what for finding in verify_directory(directory).findings if not finding.key]


def as_version_1(directory: Path) -> Path:
    """The directory as the program indexed it before shards had hashes."""
    manifest = load_manifest(str(directory))
    entries = [{"name": s.name, "samples": s.samples, "bytes": s.bytes} for s in manifest.shards]
    content = {"version": 1, "digest": manifest.names_digest, "samples": manifest.samples, "shards": entries}
    (directory / "manifest.json").write_text(json.dumps(content))
    for path in directory.glob("*.idx"):
        path.write_bytes(ShardIndex(path.read_bytes(), str(path)).places)
    return directory


def test_the_checksums_are_those_of_the_members_and_of_the_whole(tmp_path):
    contents = {"a.txt": b"1" * 700, "b.jpg": b"2" * 3_000_000, "c.txt": b"", "a.jpg": b"4" * 512, "b.txt": b"5"}
    path = write_tar(tmp_path / "a.tar", contents)
    index, sha256 = with_checksums(path, index_shard(path))
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    for read in (index, ShardIndex(index.data, "a.idx")):
        sums = {m.name: m.crc32 for sample in range(read.samples) for m in read.members(sample)}
        assert sums == {name: zlib.crc32(content) for name, content in contents.items()}
        assert [read.key(sample) for sample in range(3)] == ["a", "b", "c"]
    assert index.places == index_shard(path).data and index.data.startswith(index.places)


@pytest.mark.parametrize("change", [reordered, another_picture])
def test_a_shard_of_the_same_size_with_another_content_is_not_used(directory, change):
    before = load_manifest(str(directory))
    size = (directory / "00000.tar").stat().st_size
    change(directory)
    assert (directory / "00000.tar").stat().st_size == size
    for use in (ShardReader.check_some, lambda reader: reader.read(0, 0)):
        with pytest.raises(ShardError, match=r"00000.tar was changed after indexing or is damaged: 00000000\d.jpg"):
            use(ShardReader(before))
    assert any("has another content" in what for what in shard_findings(directory))
    assert index_directory(directory).scanned == 1
    after = load_manifest(str(directory))
    assert after.digest != before.digest and after.names_digest == before.names_digest
    ShardReader(after).check_some()


def test_a_shard_that_changes_under_a_run_is_noticed_at_the_next_sample_that_differs(directory):
    reader = ShardReader(load_manifest(str(directory)))
    assert reader.read(0, 1)["txt"] == b"000000001"
    another_picture(directory)
    assert reader.read(0, 1)["txt"] == b"000000001"
    assert reader.read(0, 0, wanted=("txt",))["txt"] == b"000000000"
    with pytest.raises(ShardError, match=r"000000000.jpg, at byte 512, is not what it was"):
        reader.read(0, 0)


def test_an_older_shard_with_another_content_is_indexed_again(directory):
    """As rsync -a brings it: mtime of its source, size as before."""
    index_directory(directory)
    path = reordered(directory)
    os.utime(path, (1, 1))
    assert index_directory(directory).scanned == 1
    assert shard_findings(directory) == []


def test_a_shard_that_was_only_moved_is_hashed_once_and_stays_up_to_date(directory, monkeypatch):
    index_directory(directory)
    os.utime(directory / "00000.idx", (1, 1))
    assert index_directory(directory).scanned == 0
    monkeypatch.setattr("pretrain.data.shards.indexing.sha256_of", lambda path, real=_sha256: real(path))
    assert index_directory(directory).scanned == 0


def _sha256(path: Path) -> str:
    assert path.suffix == ".idx", f"{path} is read again"
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"jpg 512 ", b"jpg 513 ", 1),
        lambda data: data[:-2] + (b"0" if data[-2:-1] != b"0" else b"1") + b"\n",
        lambda data: b"\n".join([*data.split(b"\n")[:1], *reversed(data.split(b"\n")[1:3]), *data.split(b"\n")[3:]]),
        lambda data: ShardIndex(data, "").places,
    ],
)
def test_an_index_that_was_edited_or_is_stale_is_refused(directory, change):
    path = directory / "00000.idx"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ShardError, match=r"00000.idx is not the index that the manifest names"):
        ShardReader(load_manifest(str(directory))).read(0, 0)
    assert shard_findings(directory) == ["00000.idx does not match it; run python -m data_tools.index again"]
    assert index_directory(directory).scanned == 1


@pytest.mark.parametrize("line", [b"crc32 0123\n", b"crc32 xyz\n", b"crc32 \n", b"crc32 01234567 \n8\n"])
def test_damaged_checksums_are_refused(line):
    with pytest.raises(ShardError, match=r"a.idx is damaged: .*checksums"):
        ShardIndex(b"v1.2 2\njpg 512 1 a.jpg\njpg 1536 1 b.jpg\n" + line, "a.idx")


def test_a_directory_of_before_is_read_keeps_its_digest_and_gets_hashes(directory):
    now = load_manifest(str(directory))
    everything = read_all(ShardReader(now))
    old = load_manifest(str(as_version_1(directory)))
    assert old.digest == old.names_digest == now.names_digest != now.digest
    assert read_all(ShardReader(old)) == everything
    assert ["has no checksums" in what for what in shard_findings(directory)] == [True]
    assert index_directory(directory).scanned == 1 and load_manifest(str(directory)) == now


def test_a_cached_copy_of_another_content_is_not_used(directory, tmp_path):
    pattern = f"pipe:cat {directory}/00000.tar"
    assert ShardReader(load_manifest(pattern), tmp_path / "cache").read(0, 0)["__key__"] == b"000000000"
    reordered(directory)
    index_directory(directory)
    assert ShardReader(load_manifest(pattern), tmp_path / "cache").read(0, 0)["__key__"] == b"000000001"
