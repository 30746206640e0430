"""documents: every format gives the same documents; unusable ones are counted and never fatal."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.text import documents
from data_tools.text.documents import MAX_BYTES, find_inputs, kind_of, read_blocks, text_of_document

TEXTS = ["First document.\nIt has two lines.", "Second: caf\u00e9, \u4e2d\u6587.", "Third \u2028 one"]
PACKERS = {"": lambda data: data, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKERS[".zst"] = lambda data: pa.Codec("zstd").compress(data, asbytes=True)


def read(path: Path, **how) -> list[tuple[str, str]]:
    """(text, reason) of every document."""
    inputs = find_inputs([path], **how)
    return [text_of_document(raw, inputs[raw.source]) for block in read_blocks(inputs) for raw in block.documents]


def good(texts=TEXTS) -> list[tuple[str, str]]:
    return [(text, "") for text in texts]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def jsonl(rows: list) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.mark.parametrize("packed", PACKERS)
def test_jsonl_and_text_in_every_packing(tmp_path, packed):
    rows = jsonl([{"id": 1, "text": text} for text in TEXTS])
    assert read(write(tmp_path / f"a.jsonl{packed}", PACKERS[packed](rows))) == good()
    blank = "\n\n \n".join(TEXTS).encode()
    assert [
        t.strip() for t, _ in read(write(tmp_path / f"b.txt{packed}", PACKERS[packed](blank)), split="blank")
    ] == TEXTS
    assert read(write(tmp_path / f"c.txt{packed}", PACKERS[packed](blank))) == good(["\n\n \n".join(TEXTS)])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_of_every_kind_of_text(tmp_path, kind):
    values = pa.array(TEXTS).cast(kind) if not pa.types.is_dictionary(kind) else pa.array(TEXTS).dictionary_encode()
    pq.write_table(pa.table({"id": [1, 2, 3], "Body": values}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", column="Body") == good()


def test_a_bom_and_windows_lines_are_read(tmp_path):
    data = b"\xef\xbb\xbf" + b'{"text": "one"}\r\n\r\n{"text": "two"}\r\n'
    assert read(write(tmp_path / "a.jsonl", data)) == good(["one", "two"])


def test_unusable_documents_have_a_reason(tmp_path):
    lines = [
        *(b'{"text": "good"}', b"{broken", b'{"text": null}', b'{"text": 5}', b'{"other": "x"}', b'["text"]'),
        *(
            b'{"text": "  "}',
            b'{"text": "\xff\xfe"}',
            b"[" * 100_000,
            b'{"text": "nul \\u0000 stays"}',
            b'{"text": ""}',
        ),
        *(b'{"text": "' + b"x" * MAX_BYTES + b'"}', b'{"text": "last"}'),
    ]
    documents = read(write(tmp_path / "a.jsonl", b"\n".join(lines)))
    reasons = ["", "not_json", "no_text", "no_text", "no_text", "no_text", "empty", "not_utf8", "not_json", "", "empty"]
    assert [reason for _, reason in documents] == [*reasons, "too_long", ""]
    assert documents[9] == ("nul \0 stays", "") and documents[-1] == ("last", "")


def test_bad_rows_of_parquet_are_counted(tmp_path):
    values = pa.array([b"good", None, b"\xff\xfe", b"", b"x" * (MAX_BYTES + 1)]).cast(pa.binary())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    # A string column with invalid UTF-8, as some writers make it.
    lying = pa.Array.from_buffers(pa.string(), 5, values.buffers(), null_count=1)
    pq.write_table(pa.table({"text": lying}), tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet"):
        assert [reason for _, reason in read(tmp_path / name)] == ["", "no_text", "not_utf8", "empty", "too_long"]


def test_documents_between_blank_lines_that_are_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_BYTES", 20)
    data = (
        b"\n\nshort\n\n" + b"a line of it\n" * 5 + b"\n" + b"x" * 90 + b"\nits rest\n\n \nend" + b"\n" * 30 + b"y" * 21
    )
    texts = read(write(tmp_path / "a.txt", data), split="blank")
    assert [(text.strip(), reason) for text, reason in texts] == [
        ("short", ""),
        ("", "too_long"),
        ("", "too_long"),
        ("end", ""),
        ("", "too_long"),
    ]


@pytest.mark.parametrize(("split", "name"), [("file", "a.txt"), ("blank", "a.txt"), ("file", "a.jsonl")])
def test_a_huge_line_takes_no_more_memory_than_a_document(tmp_path, split, name):
    path = tmp_path / f"{name}.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b"x" * 2**20)
    tracemalloc.start()
    try:
        assert read(path, split=split) == [("", "too_long")]
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_BYTES
    finally:
        tracemalloc.stop()


def test_blocks_are_bounded_and_cover_everything_in_order(tmp_path):
    write(tmp_path / "a.jsonl", jsonl([{"text": f"document {n}"} for n in range(25)]))
    write(tmp_path / "b.txt", b"\n\n".join(b"paragraph %d" % n for n in range(7)))
    inputs = find_inputs([tmp_path], split="blank")
    blocks = list(read_blocks(inputs, most_documents=10))
    assert [(block.number, len(block.documents)) for block in blocks] == [(0, 10), (1, 10), (2, 10), (3, 2)]
    assert [(raw.source, raw.number) for block in blocks for raw in block.documents] == [
        *((0, n) for n in range(25)),
        *((1, n) for n in range(7)),
    ]
    assert blocks[-1].position == documents.total_bytes(inputs)
    assert [block.position for block in blocks] == sorted(block.position for block in blocks)
    small = list(read_blocks(inputs, most_bytes=1))
    assert all(len(block.documents) == 1 for block in small)


def test_names_are_short_if_unambiguous(tmp_path):
    for name in ("x/deep/b.txt", "x/a.txt.gz", "y/a.txt", "x/.hidden.txt", "x/readme.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"" if name.endswith("gz") else b"text")
    assert [source.name for source in find_inputs([tmp_path / "x"])] == ["a.txt.gz", "deep/b.txt"]
    both = find_inputs([tmp_path / "y", tmp_path / "y/../x/deep/b.txt"])
    assert [source.name for source in both] == ["a.txt", "b.txt"]
    (tmp_path / "x/a.txt").write_text("again")
    names = [source.name for source in find_inputs([tmp_path / "x/a.txt", tmp_path / "y/a.txt"])]
    assert names == [str(tmp_path / "x/a.txt"), str(tmp_path / "y/a.txt")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("a.TXT", "text"), ("a.json.gz", "jsonl"), ("a.ndjson", "jsonl"), ("a.parquet", "parquet")),
        *(("a.parquet.gz", ""), ("a.tar", ""), ("a.gz", ""), ("a", "")),
    ],
)
def test_kinds_go_by_the_ending(name, kind):
    assert kind_of(Path(name)) == kind


def cut_gzip(path: Path) -> Path:
    return write(path, gzip.compress(jsonl([{"text": str(n) * 50} for n in range(3000)]))[:-2000])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "none.txt", "does not exist"),
        (lambda d: write(d / "a.tar", b""), "unsupported format"),
        (lambda d: d, "contains no documents"),
        (lambda d: write(d / "a.jsonl", b"broken\n" + jsonl([{"Body": "x", "id": 1}])), "columns are Body, id"),
        (lambda d: write(d / "a.json", b' [{"text": "x"}]'), "one object per line"),
        (lambda d: write(d / "a.parquet", b"PAR1"), "is not a parquet file"),
        (lambda d: write(d / "a.txt.gz", b"no gzip"), "truncated or damaged"),
        (lambda d: write(d / "a.txt.zst", b"no zstd at all"), "truncated or damaged"),
        (lambda d: write(d / "a.txt.bz2", b"no bzip2"), "truncated or damaged"),
        (lambda d: write(d / "a.txt.xz", b"no xz at all"), "truncated or damaged"),
        (lambda d: cut_gzip(d / "a.jsonl.gz"), "truncated or damaged"),
    ],
)
def test_mistakes_are_named(tmp_path, make, message):
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_missing_column_or_one_without_text_is_named(tmp_path):
    pq.write_table(pa.table({"id": [1], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text-col=text is not in .*columns are id, caption"):
        find_inputs([tmp_path])
    with pytest.raises(ValueError, match="has the type int64, not text"):
        find_inputs([tmp_path], column="id")


def test_a_parquet_that_is_damaged_inside_is_named(tmp_path):
    pq.write_table(pa.table({"text": ["some words " * 50 + str(n) for n in range(5000)]}), tmp_path / "a.parquet")
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[1000 : len(data) // 2] = bytes(len(data) // 2 - 1000)
    write(tmp_path / "a.parquet", bytes(data))
    with pytest.raises(ValueError, match=r"a\.parquet is truncated or damaged"):
        read(tmp_path / "a.parquet")


def test_a_file_given_twice_is_refused(tmp_path):
    path = write(tmp_path / "a.txt", b"text")
    with pytest.raises(ValueError, match="given twice"):
        find_inputs([path, tmp_path])


def test_a_long_paragraph_of_short_lines_takes_no_longer_than_other_text(tmp_path):
    """As a list of words has. Its lines were copied at each further one: hours for a few megabytes."""
    words = b"".join(b"%d\n" % number for number in range(100_000))
    start = time.process_time()
    assert read(write(tmp_path / "words.txt", words + b"\nlast"), split="blank") == good([words.decode(), "last"])
    assert time.process_time() - start < 5
