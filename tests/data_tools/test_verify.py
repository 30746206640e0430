"""data_tools.verify: each kind of problem is reported with its shard and key, and a clean source has none."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from data_tools.verify import Finding, main, verify_directory
from pretrain.data.shards.indexing import index_directory
from pretrain.data.shards.reader import ShardError
from tests import toys
from tests.toys import Sample, black_png, encoded, read_all, refused


def picture(mode: str = "RGB", size: tuple[int, int] = (20, 16), kind: str = "JPEG") -> bytes:
    image = Image.fromarray(toys.picture(0, size[1], size[0]))
    return encoded((image.convert("L") if mode == "I;16" else image).convert(mode), kind)


def write_shard(directory: Path, number: int, samples: list[Sample]) -> Path:
    """Shards of other tools: nothing says how many samples there should be."""
    return toys.write_shard(directory, number, samples, stats=False)


def pair(key: str, image: bytes | None = None, text: bytes | None = b"a red circle") -> Sample:
    return {"key": key, "jpg": picture() if image is None else image, "json": b"{}", "txt": text}


@pytest.fixture
def source(tmp_path) -> Path:
    for number in range(2):
        write_shard(tmp_path / "source", number, [pair(f"{number}a"), pair(f"{number}b")])
    index_directory(tmp_path / "source")
    return tmp_path / "source"


def test_a_clean_source_is_clean(source, capsys, tmp_path):
    assert main([str(source), "--decode", "--json", str(tmp_path / "report.json")]) == 0
    assert "4 samples in 2 shards: clean" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text()) == {"shards": 2, "samples": 4, "findings": []}


def test_unusual_but_usable_pictures_are_not_reported(source):
    samples = [pair("gray", picture("L")), pair("cmyk", picture("CMYK")), pair("tiny", picture(size=(1, 1)))]
    samples += [{"key": "rgba", "png": picture("RGBA", kind="PNG"), "txt": "x"}]
    samples += [{"key": "deep", "png": picture("I;16", kind="PNG"), "txt": "bjørn"}]
    samples += [{"key": "web", "webp": picture(kind="WEBP"), "txt": "x"}]
    write_shard(source, 2, samples)
    index_directory(source)
    assert verify_directory(source, decode=True).findings == []


def test_every_bad_sample_is_named(source, capsys):
    half = picture(size=(200, 200))
    samples = [
        pair("good"),
        pair("no_caption", text=None),
        pair("latin", text="caf\xe9".encode("latin-1")),
        pair("blank", text=b" \n"),
        pair("zero", image=b""),
        pair("html", image=b"<html>404 not findings</html>"),
        pair("half", image=half[: len(half) // 2]),
        {"key": "bomb", "png": black_png(10_000, 10_000, rows=0), "txt": "boom"},
        {"key": "huge", "png": black_png(50_000, 50_000, rows=0), "txt": "boom"},
        {"key": "no_picture", "txt": "text"},
        {"key": "two", "jpg": picture(), "png": picture(kind="PNG"), "txt": "x"},
        pair("twice"),
        pair("twice"),
    ]
    write_shard(source, 1, samples)
    index_directory(source)
    findings = verify_directory(source, workers=2).findings
    assert {finding.shard for finding in findings} == {"00001.tar"}
    by_key: dict[str, list[str]] = {}
    for finding in findings:
        by_key.setdefault(finding.key, []).append(finding.what)
    assert by_key["no_caption"] == ["has no caption (.txt)"]
    assert by_key["latin"] == [".txt is not UTF-8 (byte 3 of 4)"]
    assert by_key["blank"] == [".txt is blank"]
    assert by_key["zero"] == [".jpg has 0 bytes"]
    assert "not a readable JPEG, PNG or WebP" in by_key["html"][0]
    assert "10000 x 10000 pixels" in by_key["bomb"][0]
    assert "2500000000 pixels" in by_key["huge"][0] or "50000 x 50000 pixels" in by_key["huge"][0]
    assert by_key["no_picture"] == ["has no picture"]
    assert by_key["two"] == ["has 2 pictures (.jpg, .png)"]
    assert len(by_key["twice"]) == 3 and "occurs more than once" in by_key["twice"][0]
    assert set(by_key) == {"no_caption", "latin", "blank", "zero", "html", "bomb", "huge", "no_picture", "two", "twice"}
    # Its header is complete: only decoding shows that the pixels are not.
    decoded = verify_directory(source, decode=True).findings
    assert [finding.key for finding in decoded if finding not in findings] == ["half"]
    assert main([str(source)]) == 1
    assert f"{source}/00001.tar\tlatin\t.txt is not UTF-8 (byte 3 of 4)\n" in capsys.readouterr().out


def test_every_bad_shard_is_named(source, tmp_path):
    write_shard(source, 2, [pair("2a")])
    write_shard(source, 3, [pair("3a")])
    index_directory(source)
    os.truncate(source / "00000.tar", 3000)
    (source / "00001.tar").unlink()
    (source / "00002.idx").unlink()
    write_shard(source, 3, [pair("3a"), pair("3b"), *[pair("3c")] * 9])
    write_shard(source, 4, [pair("4a")])
    assert main([str(source), "--json", str(tmp_path / "report.json")]) == 1
    findings = json.loads((tmp_path / "report.json").read_text())["findings"]
    assert {finding["directory"] for finding in findings} == {str(source)}
    what: dict[str, str] = {}
    for finding in findings:
        what[finding["shard"]] = what.get(finding["shard"], "") + finding["what"] + "\n"
    assert "manifest.json says" in what["00000.tar"] and "is truncated at byte 3000" in what["00000.tar"]
    assert "missing" in what["00001.tar"]
    assert "has no 00002.idx" in what["00002.tar"]
    assert "has 3 samples but manifest.json says 1" in what["00003.tar"]
    assert "is not in manifest.json" in what["00004.tar"]


def test_a_wrong_index_and_a_wrong_count_are_reported(source):
    (source / "00000.idx").write_bytes((source / "00001.idx").read_bytes())
    for number in range(2):
        (source / f"{number:05d}_stats.json").write_text(json.dumps({"successes": 2 + number}))
    assert verify_directory(source).findings == [
        Finding("00000.tar", "", "00000.idx does not match it; run python -m data_tools.index again"),
        Finding("00001.tar", "", "has 2 samples but 00001_stats.json says 3"),
    ]


def test_a_source_without_index_is_checked_too(tmp_path):
    write_shard(tmp_path, 0, [pair("a"), pair("b", text=b"\xff")])
    findings = verify_directory(tmp_path).findings
    assert [(finding.shard, finding.key) for finding in findings] == [("manifest.json", ""), ("00000.tar", "b")]


def test_the_kind_of_a_source_decides_what_may_be_missing(tmp_path):
    images, texts = tmp_path / "images", tmp_path / "texts"
    write_shard(images, 0, [pair("a", text=None)])
    write_shard(texts, 0, [{"key": "a", "txt": "some text"}])
    for directory in (images, texts):
        index_directory(directory)
        assert verify_directory(directory).findings == []
        assert len(verify_directory(directory, kind="pairs").findings) == 1


def test_partial_shards_are_noted_and_not_checked(source, capsys):
    for number in range(2):
        (source / f"{number:05d}_stats.json").write_text(json.dumps({"successes": 2}))
    (source / "00005.tar").write_bytes(b"partial")
    assert main([str(source)]) == 0
    assert "00005.tar is partial" in capsys.readouterr().out


def test_a_key_that_would_break_the_line_is_quoted(source):
    write_shard(source, 0, [pair("a\tb\nc", text=None), pair("ok")])
    index_directory(source)
    (finding,) = verify_directory(source).findings
    assert finding.key == r"'a\tb\nc'"


def test_nothing_to_check_is_exit_code_2(tmp_path, capsys):
    assert "contains no .tar file" in refused(capsys, main, tmp_path)


@pytest.mark.parametrize("stats", ["{", '{"successes": "2"}', '{"successes": 1e999}', "[2]", "[" * 10**5, "1" * 400])
def test_damaged_stats_are_a_finding(source, stats):
    for number in range(2):
        (source / f"{number:05d}_stats.json").write_text(stats if number else '{"successes": 2}')
    (finding,) = verify_directory(source).findings
    assert finding.shard == "00001.tar" and finding.what.startswith("00001_stats.json cannot be used: ")


def test_a_named_pipe_in_the_place_of_an_index_is_not_waited_for(source):
    (source / "00001.idx").unlink()
    os.mkfifo(source / "00001.idx")
    assert [finding.what[:16] for finding in verify_directory(source).findings] == ["has no 00001.idx"]
    with pytest.raises(ShardError, match=r"00001.idx is a named pipe, not a regular file"):
        read_all(source)
    assert index_directory(source).scanned == 1 and len(read_all(source)) == 4
