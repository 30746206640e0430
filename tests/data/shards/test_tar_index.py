"""The index of one shard: its format, what it omits, and tars that are truncated, damaged or hostile."""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, strategies
from webdataset.tariterators import base_plus_ext

from pretrain.data.shards.reader import ShardError, ShardReader, load_manifest
from pretrain.data.shards.tar_index import ShardIndex, index_shard, scan_shard, split_name
from pretrain.data.shards.tar_members import FILE, SPARSE, tar_members
from tests.toys import index_source, write_tar


def linked(name: str, kind: bytes, target: str = "a.jpg") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_an_index_is_what_dalis_wds2idx_writes(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"0001.jpg": b"x" * 700, "0001.txt": b"hello", "0002.jpg": b"y"})
    expected = b"v1.2 2\njpg 512 700 0001.jpg txt 2048 5 0001.txt\njpg 3072 1 0002.jpg\n"
    assert index_shard(path).data == expected


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_read_back(tmp_path, form):
    long = "d" * 90 + "/" + "k" * 60
    names = [f"{long}.jpg", "with space and % sign.jpg", "bjørn 熊.jpg"]
    path = write_tar(tmp_path / "a.tar", {name: name.encode() for name in names}, format=form)
    index = index_shard(path)
    assert [index.key(i) for i in range(3)] == [name.removesuffix(".jpg") for name in names]
    assert index.data.isascii()
    assert all(len(line.split(b" ")) == 4 for line in index.data.splitlines()[1:])
    data = path.read_bytes()
    for i, name in enumerate(names):
        (member,) = index.members(i)
        assert data[member.offset : member.offset + member.size] == name.encode()


def test_a_name_that_is_not_utf8_still_has_a_printable_key(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"caf\udce9.jpg": b"x"}, format=tarfile.GNU_FORMAT)
    assert index_shard(path).key(0) == "caf\\xe9"


def test_only_pictures_texts_and_json_are_indexed(tmp_path):
    members = [
        ("a.JPG", b"1"),
        ("a.pyd", b"evil"),
        ("a.pkl", b"evil"),
        ("a.seg.png", b"mask"),
        ("../../etc/passwd.txt", b"text"),
        ("._a.jpg", b"resource fork"),
        (".hidden.txt", b"no"),
        ("README", b"no"),
        (linked("b.jpg", tarfile.SYMTYPE), None),
        (linked("c.jpg", tarfile.LNKTYPE, "a.JPG"), None),
        (linked("d.jpg", tarfile.DIRTYPE), None),
        (linked("e.jpg", tarfile.FIFOTYPE), None),
    ]
    index = index_shard(write_tar(tmp_path / "a.tar", members))
    assert [index.key(i) for i in range(index.samples)] == ["a", "../../etc/passwd"]
    assert [member.extension for member in index.members(0)] == ["jpg"]


def test_members_of_one_key_are_one_sample_and_the_later_of_two_counts(tmp_path):
    members = [("a.jpg", b"old"), ("b.jpg", b"b"), ("a.txt", b"caption"), ("a.jpg", b"newer"), ("b.txt", b"t")]
    path = write_tar(tmp_path / "00000.tar", members)
    reader = ShardReader(load_manifest(str(index_source(tmp_path))))
    assert index_shard(path).samples == 2
    assert reader.read(0, 0) == {"__key__": b"a", "jpg": b"newer", "txt": b"caption"}


@given(strategies.text("a.B/", max_size=9))
def test_split_name_is_webdatasets(name):
    key, extension = base_plus_ext(name)
    own = split_name(name)
    assert own == (key, extension.lower()) if key else "" in own, (own, key)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0, "truncated at byte 0"),
        (300, "truncated at byte 300"),
        (512 + 100, "truncated at byte 612, inside 'a.jpg', which ends at byte 1212"),
        (512 + 700, "truncated at byte 1212"),  # the content is complete, its padding is not
        (1536, "truncated at byte 1536: the end mark is missing"),  # exactly between two members
        (1536 + 200, "truncated at byte 1736"),
        (3 * 1024, "truncated at byte 3072: the end mark is missing"),
    ],
)
def test_a_tar_that_is_cut_off_is_refused_by_name_and_byte(tmp_path, keep, words):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"x" * 700, "b.jpg": b"y" * 700})
    os.truncate(path, keep)
    with pytest.raises(ShardError, match=words) as error:
        index_shard(path)
    assert str(path) in str(error.value)


def test_a_damaged_header_is_refused_though_tarfile_stops_silently(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"a.jpg": b"x", "b.jpg": b"y", "c.jpg": b"z"})
    data = bytearray(path.read_bytes())
    data[1024 + 148 : 1024 + 156] = b"0000000\0"  # the checksum of b.jpg
    path.write_bytes(data)
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["a.jpg"]
    with pytest.raises(ShardError, match="damaged at byte 1024: there is no tar header"):
        index_shard(path)


def test_a_compressed_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(ShardError, match="compressed"):
        index_shard(tmp_path / "a.tar")


def test_a_negative_size_does_not_loop(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + (-1024 % 2**16).to_bytes(2, "big")  # base-256, as GNU writes large numbers
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(10240))
    with pytest.raises(ShardError):
        index_shard(tmp_path / "a.tar")


def header(kind: bytes, size: int, name: str = "x") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def block(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


LONG_NAME = header(b"L", 6) + block(b"a.jpg\0")
PAX = header(b"x", 14) + block(b"14 path=a.jpg\n")


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        (LONG_NAME * 3000, "more than 16 headers describe one member"),
        (PAX * 3000, "more than 16 headers describe one member"),
        (header(b"g", 14) + block(b"14 comment=xy\n") + LONG_NAME + header(b"K", 0) + PAX, ""),
        (header(b"x", 6 * 2**30), "claims a header of 6,442,450,944 bytes"),
        (header(b"g", 2**62), "claims a header of"),
        (header(b"L", 2**21) + bytes(2**21), "claims a header of 2,097,152 bytes"),
        (header(b"x", 10**6) + block(b"1" * 10**6), "records are damaged"),  # tarfile takes hours
        (header(b"x", 4026) + block(b"4026 size=" + b"9" * 4015 + b"\n"), "size is no number"),
        (header(b"x", 14) + block(b"14 size=-5120\n"), "size is no number"),
        (header(b"g", 14) + block(b"14 path=a.jpg\n"), "a header for all members names a single one"),
        (PAX + bytes(512), "describes a member that does not follow"),
    ],
)
def test_headers_that_describe_headers_are_bounded(tmp_path, headers, words):
    (tmp_path / "a.tar").write_bytes(headers + header(b"0", 1, "b.jpg") + block(b"x") + bytes(1024))
    if not words:
        assert index_shard(tmp_path / "a.tar").members(0)[0].name == "a.jpg"
        return
    with pytest.raises(ShardError, match=words):
        index_shard(tmp_path / "a.tar")


NAMES = strategies.text("ab/é\udce9.", min_size=1, max_size=260)


@given(strategies.lists(strategies.tuples(NAMES, strategies.binary(max_size=600)), max_size=4))
def test_headers_are_read_as_tarfile_reads_them(members):
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with TemporaryDirectory() as place:
            path = write_tar(Path(place) / "a.tar", members, format=form)
            with tarfile.open(path) as tar:
                expected = [(m.name.rstrip("/"), m.isreg(), m.offset_data, m.size if m.isreg() else 0) for m in tar]
            own = [(m.name, m.kind == FILE, m.offset, m.size) for m in tar_members(path)]
            assert [(name.rstrip("/"), *rest) for name, *rest in own] == expected


@pytest.mark.parametrize("form", ["oldgnu", "posix --sparse-version=0.0", "posix --sparse-version=0.1", "posix"])
def test_a_file_with_holes_is_left_out_and_the_next_one_read(tmp_path, form):
    with (tmp_path / "a.jpg").open("wb") as file:
        for number in range(60):  # more than one header of the old format holds
            file.seek(number * 2**16)
            file.write(b"x")
    (tmp_path / "b.jpg").write_bytes(b"picture")
    line = ["tar", "-C", str(tmp_path), "-Scf", str(tmp_path / "0.tar"), *f"--format={form}".split(), "a.jpg", "b.jpg"]
    subprocess.run(line, check=True)
    index, left_out = scan_shard(tmp_path / "0.tar")
    (member,) = index.members(0)
    data = (tmp_path / "0.tar").read_bytes()
    assert data[member.offset : member.offset + member.size] == b"picture" and left_out == {SPARSE: 1}


@pytest.mark.parametrize(
    "data",
    [b"", b"v1.2 1\n", b"v1.1 1\njpg 0 1\n", b"v1.2 1\njpg 0 1 a.jpg", b"v1.2 2\njpg 0 1 a.jpg\n", b"garbage\n" * 9],
)
def test_a_damaged_index_is_refused(data):
    with pytest.raises(ShardError, match=r"index WHERE.idx is damaged.*data_tools.index"):
        ShardIndex(data, "WHERE.idx")


@pytest.mark.parametrize(
    "line", [b"jpg 0 a.jpg", b"jpg -1 5 a.jpg", b"jpg x 5 a.jpg", b" ", b"jpg 9223372036854775808 5 a.jpg"]
)
def test_a_damaged_line_is_refused(line):
    with pytest.raises(ShardError, match="damaged"):
        ShardIndex(b"v1.2 1\n" + line + b"\n", "a.idx").members(0)
