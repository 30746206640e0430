"""data_tools.shards.samples: the samples of a tar as training reads them, and tables that are made once."""

from __future__ import annotations

import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.shards.samples import make_table, samples_of
from pretrain.data.shards.cache import ShardError
from pretrain.data.shards.reader import MAX_TEXT_BYTES
from tests.toys import write_tar

SCHEMA = pa.schema([("key", pa.string())])


@pytest.fixture
def shard(tmp_path):
    """Members out of order, a repeated one, a key that is not UTF-8, unknown endings."""
    members = [("b.TXT", b"old"), ("a.jpg", b"jpg"), ("b.png", b"png"), ("b.txt", b"new\xff"), ("a.exe", b"exe")]
    members += [("a.webp", b"webp"), ("\udcff.txt", b""), (".hidden", b"x"), ("c.txt", bytes(MAX_TEXT_BYTES + 1))]
    return write_tar(tmp_path / "00000.tar", members, format=tarfile.GNU_FORMAT)


def test_samples_come_in_the_order_of_their_keys(shard):
    samples = list(samples_of(shard))
    assert [(sample.key, sorted(sample.members)) for sample in samples] == [
        ("\\xff", ["txt"]),
        ("a", ["jpg", "webp"]),
        ("b", ["png", "txt"]),
        ("c", ["txt"]),
    ]
    with open(shard, "rb") as file:
        # Empty, missing, the later of two, too long.
        assert [sample.text(file) for sample in samples] == [None, None, "new\N{REPLACEMENT CHARACTER}", None]
        contents = []
        for picture in (samples[1].picture, samples[2].picture):
            file.seek(picture.offset)
            contents.append(file.read(picture.size))
    assert contents == [b"jpg", b"png"] and samples[0].picture is None


def test_a_broken_tar_is_named(shard):
    os.truncate(shard, 3000)
    with pytest.raises(ShardError, match=r"00000\.tar is .*3000"):
        next(samples_of(shard))


def test_a_table_is_made_once_per_state_of_its_tar(shard, tmp_path):
    file = tmp_path / "00000.parquet"

    def rows(tar):
        return ({"key": sample.key} for sample in samples_of(tar))

    def made(version=1, schema=SCHEMA) -> bool:
        return make_table(shard, file, schema, version, rows) is not None

    assert made() and not made() and pq.read_table(file)["key"].to_pylist() == ["\\xff", "a", "b", "c"]
    assert made(version=2) and made(version=2, schema=SCHEMA.append(pa.field("words", pa.int32())))
    assert made() and not made()
    os.utime(shard, ns=(0, 0))
    assert made() and not made()
    file.write_bytes(b"cut short")
    assert made() and not made()
