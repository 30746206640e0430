"""Shards have img2dataset's format, their bytes depend only on the samples, and unfinished ones are invisible."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.shards.writer import ShardWriter
from pretrain.data.shards.indexing import complete_shards, index_directory
from pretrain.data.shards.reader import ShardReader, load_manifest
from tests.toys import full_beyond


def write(directory: Path, samples: int, size: int = 0, **limits) -> ShardWriter:
    with ShardWriter(directory, **({"samples_per_shard": 4} | limits)) as writer:
        for i in range(samples):
            writer.write(f"k{i}", {"txt": f"text {i}".encode() + bytes(size), "json": b"{}"}, {"url": f"u{i}", "n": i})
    return writer


def digests(directory: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir() if "stats" not in p.name}


def test_samples_are_read_back_unchanged(tmp_path):
    writer = write(tmp_path, 10)
    assert [path.name for path in writer.paths] == ["00000.tar", "00001.tar", "00002.tar"] and writer.samples == 10
    index_directory(tmp_path)
    reader = ShardReader(load_manifest(str(tmp_path)))
    assert reader.manifest.counts == [4, 4, 2]
    assert reader.read(1, 2) == {"__key__": b"k6", "txt": b"text 6", "json": b"{}"}
    for path, count in zip(writer.paths, (4, 4, 2), strict=True):
        stats = json.loads(path.with_name(f"{path.stem}_stats.json").read_text())
        assert stats["count"] == stats["successes"] == stats["status_dict"]["success"] == count
        assert (
            stats["failed_to_download"] == stats["failed_to_resize"] == 0 and stats["end_time"] >= stats["start_time"]
        )
    rows = pq.read_table(tmp_path / "00002.parquet").to_pylist()
    assert rows == [{"url": f"u{i}", "n": i, "key": f"k{i}"} for i in (8, 9)]


def test_equal_samples_make_equal_bytes(tmp_path):
    write(tmp_path / "a", 6)
    write(tmp_path / "b", 6)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_limit_of_bytes_holds_except_for_larger_samples(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=None, bytes_per_shard=4096) as writer:
        for i, size in enumerate((1000, 1000, 9000, 100, 100)):
            writer.write(f"k{i}", {"txt": b"x" * size})
    index_directory(tmp_path)
    assert load_manifest(str(tmp_path)).counts == [2, 1, 2]


def test_shards_are_numbered_from_first(tmp_path):
    assert [path.name for path in write(tmp_path, 5, first=7).paths] == ["00007.tar", "00008.tar"]


def test_after_an_error_only_complete_shards_exist(tmp_path):
    def stopped() -> None:
        with ShardWriter(tmp_path, samples_per_shard=2) as writer:
            for i in range(5):
                writer.write(f"k{i}", {"txt": b"x"})
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".tar") == ["00000.tar", "00001.tar"]
    assert not list(tmp_path.glob(".*"))


def test_the_current_shard_is_not_visible(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for i in range(3):
            writer.write(f"k{i}", {"txt": b"x"})
        assert [path.name for path in complete_shards(tmp_path)[0]] == ["00000.tar"]
        assert not (tmp_path / "00001.tar").exists()


@pytest.mark.parametrize(
    ("key", "members", "message"),
    [
        ("", {"txt": b""}, "cannot be the name"),
        ("a.b", {"txt": b""}, "cannot be the name of key 'a.b'"),
        ("a.b/", {"txt": b""}, "cannot be the name"),
        ("a", {"TXT": b""}, "cannot be the name"),
        ("a", {"x/y": b""}, "cannot be the name"),
        ("a", {}, "has no members"),
        ("twice", {"txt": b""}, "'twice' occurs twice"),
    ],
)
def test_names_that_readers_cannot_parse_are_refused(tmp_path, key, members, message):
    with ShardWriter(tmp_path, samples_per_shard=4) as writer:
        writer.write("twice", {"txt": b"1"})
        with pytest.raises(ValueError, match=message):
            writer.write(key, members)


@pytest.mark.parametrize(
    "limits",
    [{"samples_per_shard": 0}, {"samples_per_shard": None}, {"samples_per_shard": None, "bytes_per_shard": -1}],
)
def test_limits_are_checked(tmp_path, limits):
    with pytest.raises(ValueError, match=r"(samples|bytes)_per_shard"):
        ShardWriter(tmp_path, **limits)


@pytest.mark.parametrize("key", ["k" * 90 + "/" + "k" * 200, "wörter", "a b", "x\\udcff"])
def test_unusual_keys_survive(tmp_path, key):
    with ShardWriter(tmp_path, samples_per_shard=4) as writer:
        writer.write(key, {"txt": b"x"})
    index_directory(tmp_path)
    assert ShardReader(load_manifest(str(tmp_path))).read(0, 0)["__key__"].decode() == key


def test_rows_of_any_columns_become_a_table(tmp_path):
    odd = [{"n": 1, "exif": {}}, {"n": "two", "big": 2**80}, {"tags": ["a"]}, None]
    with ShardWriter(tmp_path, samples_per_shard=9) as writer:
        for i, row in enumerate(odd):
            writer.write(f"k{i}", {"txt": b"x"}, row)
    rows = pq.read_table(tmp_path / "00000.parquet").to_pylist()
    assert [row["n"] for row in rows] == ["1", "two", None, None] and rows[0]["exif"] == "{}"
    assert rows[1]["big"] == str(2**80) and rows[2]["tags"] == '["a"]'
    assert rows[3]["status"] == "success" and rows[3]["key"] == "k3"


def test_a_schema_holds_in_every_shard(tmp_path):
    schema = pa.schema([("key", pa.string()), ("n", pa.int32())])
    write(tmp_path, 6, schema=schema)
    assert all(pq.read_schema(path).equals(schema) for path in tmp_path.glob("*.parquet"))


def test_a_full_disk_names_the_file(tmp_path):
    with full_beyond(2**20), pytest.raises(OSError, match=r"cannot be written: .*00000\.tar"):
        write(tmp_path, 2, samples_per_shard=10**6, size=2**20)
    assert not list(tmp_path.iterdir())
