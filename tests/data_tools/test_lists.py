"""reading: each preset reads its format, hostile rows are counted and harmless, and errors explain wrong files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.lists import formats as list_formats
from data_tools.lists.formats import json_elements
from data_tools.lists.reading import List, fingerprint, open_list


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def everything(url_list: List, size: int = 3, **part) -> list[dict]:
    return [row for batch in url_list.batches(size, **part) for row in batch.to_pylist()]


def urls(count: int) -> list[str]:
    return [f"http://a.example/{number}.jpg" for number in range(count)]


@pytest.mark.parametrize("upper", [True, False])
def test_laion_in_any_case_with_its_numbers(tmp_path, upper):
    columns = {
        "URL": urls(2),
        "TEXT": ["a cat", " a dog "],
        "WIDTH": [640.0, None],
        "HEIGHT": [480.0, float("nan")],
        "similarity": [0.3, float("nan")],
        "punsafe": pa.array([0.1, 0.2], pa.float32()),
        "pwatermark": [None, 0.5],
        "LANGUAGE": ["en", ""],
        "hash": [1, 2],
    }
    named = {name.upper() if upper else name.lower(): column for name, column in columns.items()}
    url_list = open_list([parquet(tmp_path / "part.parquet", **named)], "laion")
    names = ("row", "url", "caption", "similarity", "punsafe", "pwatermark", "width", "height", "language")
    assert url_list.columns == names and url_list.rows == 2
    first, second = everything(url_list)
    assert list(first.values()) == [0, urls(1)[0], "a cat", 0.3, pytest.approx(0.1), None, 640, 480, "en"]
    assert list(second.values())[2:] == ["a dog", None, pytest.approx(0.2), 0.5, None, None, None]


@pytest.mark.parametrize(("preset", "order"), [("cc12m", "{url}\t{caption}"), ("cc3m", "{caption}\t{url}")])
@pytest.mark.parametrize("packed", [False, True])
def test_conceptual_captions_have_no_header_and_no_quotes(tmp_path, preset, order, packed):
    lines = [order.format(url=url, caption=f'say "hi {number}') for number, url in enumerate(urls(4))]
    path = tmp_path / ("list.tsv.gz" if packed else "list.tsv")
    data = ("\r\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    url_list = open_list([path], preset)
    assert url_list.rows == 4
    assert everything(url_list) == [
        {"row": number, "url": url, "caption": f'say "hi {number}'} for number, url in enumerate(urls(4))
    ]


def test_coyo_knows_its_own_names(tmp_path):
    path = parquet(tmp_path / "p.parquet", url=urls(1), text=["t"], clip_similarity_vitl14=[0.2], watermark_score=[0.4])
    assert everything(open_list([path], "coyo")) == [
        {"row": 0, "url": urls(1)[0], "caption": "t", "similarity": 0.2, "pwatermark": 0.4}
    ]


@pytest.mark.parametrize("images_first", [True, False])
def test_coco_joins_annotations_to_images(tmp_path, images_first):
    images = {"images": [{"id": 7, "coco_url": urls(1)[0], "width": 3, "height": 4}]}
    notes = {"annotations": [{"image_id": 7, "caption": "one"}, {"image_id": 7, "caption": "two"}, {"image_id": 9}]}
    (tmp_path / "c.json").write_text(
        json.dumps({"info": {"x": [1]}} | (images | notes if images_first else notes | images))
    )
    url_list = open_list([tmp_path / "c.json"], "coco")
    assert url_list.rows == 3
    assert [(row["row"], row["caption"], row["width"]) for row in everything(url_list)] == [
        (0, "one", 3),
        (1, "two", 3),
    ]
    assert url_list.dropped == {"empty_url": 1}


def test_sbu_is_two_arrays(tmp_path):
    path = tmp_path / "sbu.json"
    path.write_text(json.dumps({"image_urls": urls(3), "user_ids": [1, 2.5, 3], "captions": ["a", "b", "c"]}))
    assert [row["caption"] for row in everything(open_list([path], "sbu"))] == ["a", "b", "c"]
    path.write_text(json.dumps({"image_urls": urls(3), "captions": ["a", "b"]}))
    with pytest.raises(ValueError, match="different numbers of captions and image_urls"):
        everything(open_list([path], "sbu"))


def test_visual_genome_joins_regions_to_images(tmp_path):
    regions, images = tmp_path / "region_descriptions.json", tmp_path / "image_data.json"
    regions.write_text(json.dumps([{"id": 5, "regions": [{"phrase": "a cat"}, {"phrase": "a mat"}, "broken"]}]))
    images.write_text(json.dumps([{"image_id": 5, "url": urls(1)[0], "width": 8, "height": 6}]))
    url_list = open_list([regions, images], "visual_genome")
    assert [(row["url"], row["caption"]) for row in everything(url_list)] == [
        (urls(1)[0], "a cat"),
        (urls(1)[0], "a mat"),
    ]
    assert url_list.dropped == {"bad_row": 1}
    with pytest.raises(ValueError, match=r"image_data\.json"):
        open_list([regions], "visual_genome")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_generic_reads_every_format(tmp_path, ending):
    path = tmp_path / f"list.{ending}"
    rows = [{"n": 1, "Link": urls(2)[0], "alt": "one"}, {"n": 2, "Link": urls(2)[1], "alt": "two"}]
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif ending == "json":
        path.write_text(json.dumps(rows))
    else:
        mark = {"csv": ",", "tsv": "\t"}[ending]
        path.write_text("\ufeff" + "\n".join(mark.join(map(str, row)) for row in [rows[0], *map(dict.values, rows)]))
    url_list = open_list([path], "generic", "link", "alt")
    assert everything(url_list) == [
        {"row": 0, "url": urls(2)[0], "caption": "one"},
        {"row": 1, "url": urls(2)[1], "caption": "two"},
    ]
    pictures = open_list([path], "generic", "Link")
    assert [row["caption"] for row in everything(pictures)] == ["", ""]


def test_csv_cells_may_hold_line_ends_and_quotes(tmp_path):
    (tmp_path / "l.csv").write_text(f'url,caption\n{urls(1)[0]},"two\nlines ""quoted"""\nonly one\n{urls(2)[1]},x\n')
    url_list = open_list([tmp_path / "l.csv"], "generic", "url", "caption")
    assert [(row["row"], row["caption"]) for row in everything(url_list)] == [(0, 'two\nlines "quoted"'), (2, "x")]
    assert url_list.dropped == {"bad_row": 1}


HOSTILE = [
    ("http://a/0", b"good", None),
    ("", b"no url", "empty_url"),
    ("http://a/2", b"x" * 10_000_000, "long_caption"),
    ("http://a/3", b"bad \xff\xfe", "not_utf8"),
    ("http://a/4", b"nul \0 byte", "nul_byte"),
    ("http://a/" + "5" * 9000, b"long url", "long_url"),
    ("http://a/6", b"  ", "empty_caption"),
    ("http://a/7", "gut \N{GREEK SMALL LETTER ALPHA}".encode(), None),
]


@pytest.mark.parametrize("form", ["parquet", "tsv", "jsonl"])
@pytest.mark.parametrize("size", [2, 100])
def test_hostile_rows_are_counted_and_numbers_stay(tmp_path, form, size):
    path = tmp_path / f"l.{form}"
    if form == "parquet":  # a string column with invalid UTF-8
        captions = pa.array([caption for _, caption, _ in HOSTILE], pa.binary()).view(pa.string())
        parquet(path, url=[url for url, _, _ in HOSTILE], caption=captions)
    elif form == "tsv":
        path.write_bytes(b"url\tcaption\n" + b"\n".join(url.encode() + b"\t" + text for url, text, _ in HOSTILE))
    else:
        escaped = (caption.decode("utf-8", "surrogateescape") for _, caption, _ in HOSTILE)
        lines = [json.dumps({"url": url, "caption": text}) for (url, _, _), text in zip(HOSTILE, escaped, strict=True)]
        path.write_text("\n".join(lines))
    url_list = open_list([path], "generic", "url", "caption")
    assert [row["row"] for row in everything(url_list, size)] == [0, 7]
    assert url_list.dropped == {reason: 1 for _, _, reason in HOSTILE if reason}
    assert url_list.rows == len(HOSTILE)


def test_any_part_of_a_list_over_several_files(tmp_path):
    for number, count in enumerate((4, 1, 5)):
        pq.write_table(
            pa.table({"url": urls(count), "caption": [f"{number} {row}" for row in range(count)]}),
            tmp_path / f"{number}.parquet",
            row_group_size=2,
        )
    (tmp_path / "steps").mkdir()
    (tmp_path / "note.json").write_text("{}")
    whole = everything(open_list([tmp_path], "canonical"))
    assert [row["row"] for row in whole] == list(range(10))
    for first in range(11):
        for stop in (None, *range(first, 11)):
            assert everything(open_list([tmp_path], "canonical"), first=first, stop=stop) == whole[first:stop]


def test_text_files_can_be_cut_anywhere_too(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.tsv").write_text("".join(f"{url}\t{name}\n" for url in urls(3)))
    paths = [tmp_path / "a.tsv", tmp_path / "b.tsv"]
    whole = everything(open_list(paths, "cc12m"))
    assert len(whole) == 6
    for first, stop in ((0, 2), (2, 5), (3, 6), (5, None)):
        assert everything(open_list(paths, "cc12m"), first=first, stop=stop) == whole[first:stop]


def test_rows_of_a_filtered_list_keep_their_numbers(tmp_path):
    path = parquet(tmp_path / "l.parquet", row=[5, 70], url=urls(2), caption=["a", "b"])
    assert [row["row"] for row in everything(open_list([path], "canonical"))] == [5, 70]


def test_a_stream_of_json_does_not_load_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(list_formats, "_CHUNK", 7)
    content = {"skip": {"deep": [1, {"a": "]"}]}, "numbers": [12345678901, -1.5e3, 0], "empty": [], "s": ["}", 'é\\"']}
    (tmp_path / "j.json").write_text(json.dumps(content, indent=2))
    elements = list(json_elements(tmp_path / "j.json"))
    assert elements == [(key, value) for key in ("numbers", "s") for value in content[key]]
    for end in range(1, 40):
        (tmp_path / "cut.json").write_text(json.dumps([{"a": "b" * 10}, [1, 2, 3], "xyz"])[:-end])
        with pytest.raises(ValueError, match="JSON"):
            list(json_elements(tmp_path / "cut.json"))


@pytest.mark.parametrize(
    ("name", "content", "preset", "words"),
    [
        ("l.tsv", "url\tcaption\nhttp://a/1\tb\n", "cc12m", "begins with a header .*--preset=generic --url-col=url"),
        ("l.tsv", "a cat\thttp://a/1\n", "cc12m", "the columns are swapped"),
        ("l.tsv", "http://a/1\ta cat\n", "laion", "has no column url; it has 'http://a/1', 'a cat'"),
        ("l.csv", "link,alt\nhttp://a/1,b\n", "laion", "has no column url; it has 'link', 'alt'"),
        ("l.csv", "url,alt\nhttp://a/1,b\n", "laion", "has no column text or caption; it has 'url', 'alt'"),
        ("l.csv", "", "laion", "is empty"),
        ("l.csv", "url,text\n", "laion", "has no rows"),
        ("l.tsv", "", "cc12m", "has no rows"),
        ("l.parquet", "no parquet", "laion", "is not a parquet file"),
        ("l.json", '{"a": 1', "coco", "not a (complete )?JSON"),
        ("l.json", "hello", "sbu", "not a JSON list"),
        ("l.xlsx", "x", "laion", r"ends in \.xlsx"),
        ("l.csv", "url,text\nhttp://a,b\n", "generic", "needs --url-col"),
        ("l.csv", "url,text\nhttp://a,b\n", "imagenet", "use one of laion, cc12m"),
    ],
)
def test_wrong_lists_are_explained(tmp_path, name, content, preset, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=words) as raised:
        open_list([tmp_path / name], preset)
    assert "\n" not in str(raised.value)


def test_a_missing_list_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        open_list([tmp_path / "nix.parquet"], "laion")
    with pytest.raises(ValueError, match="contains no file of"):
        open_list([tmp_path], "laion")


def test_a_fingerprint_is_of_the_files_not_of_their_place(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        parquet(tmp_path / place / "l.parquet", url=urls(3))
    assert fingerprint([tmp_path / "a"]) == fingerprint([tmp_path / "b" / "l.parquet"])
    parquet(tmp_path / "b" / "l.parquet", url=urls(300))
    assert fingerprint([tmp_path / "a"]) != fingerprint([tmp_path / "b"])
