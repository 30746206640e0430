"""Tables as people have them: any dialect and encoding is read, and a damaged row costs no other row."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from data_tools.filter_list import read_domains
from data_tools.lists.reading import open_list
from data_tools.pictures.evaluation_set import _read_captions
from data_tools.text.documents import find_inputs, read_blocks, text_of_document

URL = "http://a.example/{}.jpg"


def read(path: Path, content: str | bytes, preset: str = "generic") -> tuple[list[str], dict[str, int], int]:
    """(captions, dropped rows by reason, all rows)."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    rows = open_list([path], preset, *(("url", "caption") if preset == "generic" else ()))
    captions = []
    for batch in rows.batches(7):
        assert all(url.startswith("http://") for url in batch["url"].to_pylist()), "a mark belongs to no URL"
        captions += batch["caption"].to_pylist()
    assert rows.rows == len(captions) + rows.dropped.total(), "every row counts"
    return captions, dict(rows.dropped), rows.rows


def table(mark: str, captions: list[str], header: bool = True, end: str = "\n") -> str:
    lines = [f"{URL.format(number)}{mark}{caption}" for number, caption in enumerate(captions)]
    return end.join([*([f"url{mark}caption"] if header else []), *lines, ""])


QUOTED = ['"a ""red"" bus"', "a plain bus", '"two\nlines, and \u2028 one"', '"with {} in it"']
READ = ['a "red" bus', "a plain bus", "two\nlines, and \u2028 one", "with {} in it"]


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("mark", [",", "\t", ";", "|"])
def test_quoted_cells_are_one_text_whatever_the_delimiter(tmp_path, ending, mark):
    content = table(mark, [text.format(mark) for text in QUOTED])
    assert read(tmp_path / f"l.{ending}", content) == ([text.format(mark) for text in READ], {}, 4)


@pytest.mark.parametrize(
    ("ending", "captions", "expected"),
    [
        # Conceptual Captions writes quotes as they are.
        ("tsv", ['"Hello" she said', '"The Great Wave"', 'say "hi'], None),
        ("tsv", ['"Hello', "bye"], None),
        ("csv", [r'"a \"red\" bus, parked"', "x"], ['a "red" bus, parked', "x"]),
        ("csv", ['"a "red" bus"', '"x"'], ['a "red" bus', "x"]),
        ("csv", ['"Hello" she said', "x"], None),
        ("csv", [' "spaced, out" ', "x"], ["spaced, out", "x"]),
        ("csv", ['""', '"a\r\nb"'], ["a\r\nb"]),
    ],
)
def test_quotes_are_read_as_the_writer_meant_them(tmp_path, ending, captions, expected):
    content = table({"csv": ",", "tsv": "\t"}[ending], captions)
    assert read(tmp_path / f"l.{ending}", content)[0] == (expected or captions)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize("later", ["plain", '"quoted, ""twice"""', 'size 5"', '"all"'])
def test_a_quote_that_is_never_closed_costs_one_row(tmp_path, ending, later):
    captions = ['"a, ""b"""', '"a red bus', *[f"bus {n}" for n in range(40)], later, *[f"car {n}" for n in range(6)]]
    kept, dropped, rows = read(tmp_path / f"l.{ending}", table({"csv": ",", "tsv": "\t"}[ending], captions))
    assert rows == 49 and dropped == {"bad_row": 1}
    assert kept[0] == 'a, "b"' and kept[1:41] == captions[2:42] and kept[-6:] == captions[-6:]
    batches = open_list([tmp_path / f"l.{ending}"], "generic", "url", "caption").batches_and_drops()
    assert [row for _, drops in batches for row in drops.to_pylist()] == [
        {"row": 1, "reason": "bad_row", "detail": f"l.{ending}, line 3: its quote {WHY.get(later, 'is never closed')}"}
    ]


WHY = {'size 5"': "closes only after other rows"}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("form", ["csv", "tsv", "cc12m", "jsonl", "json", "csv.gz"])
def test_every_format_in_every_encoding(tmp_path, form, encoding):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""  # the codec writes none
    captions = ["Gr\u00fc\u00dfe \u4e2d\u6587 \U0001f600", "two"]
    rows = [{"url": URL.format(n), "caption": text} for n, text in enumerate(captions)]
    texts = {
        "csv": table(",", captions).replace("url,caption", '"url","caption"'),
        "csv.gz": table(",", captions),
        "tsv": table("\t", captions),
        "cc12m": table("\t", captions, header=False),
        "jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "json": json.dumps(rows, ensure_ascii=False),
    }
    data = mark + texts[form].encode(encoding)
    path = tmp_path / ("l.tsv" if form == "cc12m" else f"l.{form}")
    preset = "cc12m" if form == "cc12m" else "generic"
    assert read(path, gzip.compress(data) if form.endswith("gz") else data, preset) == (captions, {}, 2)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_rows_end_at_every_kind_of_line_end(tmp_path, end):
    assert read(tmp_path / "l.csv", table(",", ["one", '"two, three"'], end=end)) == (["one", "two, three"], {}, 2)


def test_open_quotes_keep_the_numbers_of_lines(tmp_path):
    (tmp_path / "l.csv").write_text(table(",", ['"open', '"two\nlines"', '"open', "x", "y, z"]))
    rows = open_list([tmp_path / "l.csv"], "generic", "url", "caption")
    drops = [row["detail"] for _, drops in rows.batches_and_drops() for row in drops.to_pylist()]
    lines = ["line 2: its quote is never closed", "line 5: its quote is never closed"]
    lines.append("line 7: more than 2 cells instead of 2")
    assert drops == [f"l.csv, {line}" for line in lines]


@pytest.mark.parametrize(
    ("header", "says"),
    [('"url,caption', "header that cannot be read"), ("x," * 10_001, "has 10002 columns; the limit is 10000")],
)
def test_headers_that_are_none(tmp_path, header, says):
    with pytest.raises(ValueError, match=says):
        read(tmp_path / "l.csv", f"{header}\nhttp://a/1,x\n")


def test_blank_lines_are_no_rows_and_stray_cells_are_bad_ones(tmp_path):
    content = table(",", ["one"]) + f"\n\n{URL.format(1)},two,three\n{URL.format(2)}\n"
    assert read(tmp_path / "l.csv", content) == (["one"], {"bad_row": 2}, 3)


@pytest.mark.parametrize("name", ["d.jsonl.zst", "l.csv.zst"])
def test_a_long_window_of_zstd_is_told_from_damage(tmp_path, name):
    path = tmp_path / name
    # RFC 8878: a frame of one byte with a window of 2^28.
    path.write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([(28 - 10) << 3]) + b"\x09\0\0x")
    with pytest.raises(ValueError, match=r"was compressed with zstd --long=28 or more.* zstd -dc --long=31"):
        find_inputs([path]) if name.startswith("d") else open_list([path], "generic", "url", "caption")
    packed = pa.Codec("zstd").compress(table(",", ["one"]).encode(), asbytes=True)
    assert read(tmp_path / "m.csv.zst", packed)[0] == ["one"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("l.csv.gz", gzip.compress(table(",", [os.urandom(20).hex() for _ in range(999)]).encode())[:-500]),
        ("l.csv.gz", b"no gzip"),
        ("l.csv", b"\xff\xfe" + table(",", ["one"]).encode("utf-16-le")[:-1]),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, name, data):
    with pytest.raises(ValueError, match=r"l\.csv.* is truncated or damaged") as error:
        read(tmp_path / name, data)
    assert "\n" not in str(error.value)


LONG = 'a small dog sleeps, "quietly"\nunder \u2028 the table'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("mark", [",", "\t", ";", "|"])
def test_captions_of_an_evaluation_set_are_read_by_the_same_rules(tmp_path, mark, encoding):
    quoted = '"' + LONG.replace('"', '""') + '"'
    lines = [f"image{mark}caption", f"a.jpg{mark}{quoted}", f'a.jpg{mark}"open', f"b.jpg{mark}plain"]
    (tmp_path / "c.csv").write_bytes("\n".join(lines).encode(encoding))
    captions, _, bad = _read_captions(tmp_path / "c.csv", [Path("a.jpg"), Path("b.jpg")])
    assert captions == [LONG, "plain"] and bad == ("line 4: its quote is never closed",)


def test_documents_in_utf_16_are_documents(tmp_path):
    (tmp_path / "d.jsonl").write_bytes('{"text": "caf\u00e9"}\n{"text": "two"}\n'.encode("utf-16"))
    (inputs,) = find_inputs([tmp_path / "d.jsonl"])
    documents = [raw for block in read_blocks([inputs]) for raw in block.documents]
    assert [text_of_document(raw, inputs) for raw in documents] == [("caf\u00e9", ""), ("two", "")]


def test_a_file_of_domains_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfa.example\r\nb.example\r\n")
    assert read_domains(tmp_path / "d.txt") == ("a.example", "b.example")
