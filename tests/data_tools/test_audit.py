"""data_tools.audit: the page describes the shards, and untrusted text on it does nothing."""

from __future__ import annotations

import base64
import io
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.audit import main
from data_tools.audit_page.facts import Facts, gather
from data_tools.audit_page.funnel import funnel
from data_tools.audit_page.page import page
from data_tools.audit_page.samples import thumbnail
from data_tools.audit_page.sketches import Histogram, RandomSample, Repeats, TopCounter, lot
from data_tools.shards.steps import Drop, Step, write_drops, write_step
from data_tools.shards.writer import ShardWriter
from tests.report.reader import EVIL, Reader, check_inert


def picture(seed: int, height: int = 100, width: int = 150) -> bytes:
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture
def directory(tmp_path) -> Path:
    """12 samples in 3 shards, two with equal pictures; 6 rows that failed; a step and its drops."""
    path = tmp_path / "<i>shards"
    captions = ["a red cat", "a red cat", EVIL, "ein Hund im Schnee"] * 3
    with ShardWriter(path, samples_per_shard=4) as shards:
        for i, caption in enumerate(captions):
            data = picture(0 if i == 11 else i) if i != 5 else b"<html>"
            row = {"url": f"https://good.example/{i}.jpg", "status": "success", "error_message": None}
            shards.write(f"k{i:02d}", {"jpg": data, "txt": caption.encode()}, row)
    for parquet in path.glob("*.parquet"):
        rows = pq.read_table(parquet).to_pylist()
        for message, url in (("HTTP Error 404: Not Found", "https://bad.example/x"), (EVIL, f"https://{EVIL}/")):
            rows.append({"key": "f", "url": url, "status": "failed_to_download", "error_message": message})
        pq.write_table(pa.Table.from_pylist(rows), parquet)
    twin = f"{path}/00000/k00"
    drops = [Drop("00002", "k11", "exact_duplicate", twin), Drop("00001", "k05", EVIL, EVIL), Drop("00009", "x", EVIL)]
    write_drops(path / "drops" / "dedup.parquet", drops)
    write_step(path, "dedup", Step("dedup", 12, 9, {"exact_duplicate": 1, EVIL: 2}, time=2e9))
    return path


def test_the_facts_describe_the_shards(directory):
    facts = gather([directory], wall=5, workers=2, detect=lambda texts: ["xx" for _ in texts])
    assert (facts.shards, facts.samples, facts.pictures, facts.rows, facts.unreadable) == (3, 12, 12, 18, 1)
    assert facts.failures == {"http_404": 3, "other": 3}
    assert dict(facts.server_failures.most(9))["bad.example"] == 3 and facts.server_successes.most(1) == [
        ("good.example", 12)
    ]
    assert facts.equal_pictures.count() == 1 and facts.equal_captions.count() == 12 - 3
    assert facts.vocabulary.most(6)[:2] == [("a", 6), ("alert", 6)]
    assert facts.captions.most(1) == [("a red cat", 6)]
    assert facts.words.counts[3] == 6 and facts.words.counts[4] == 3  # edges are 0, 1, 2, ...
    assert facts.sides.total == 11 and facts.sides.bin_of(0.5) == (96, 128)
    assert facts.aspects.bin_of(0.5) == (1.43, 1.67)
    assert facts.languages == {"xx": 12}
    assert facts.dropped == {"dedup": Counter({"exact_duplicate": 1, EVIL: 2})}
    (example,) = facts.examples["exact_duplicate"]
    assert example.place.key == "k11" and example.twin.key == "k00"
    assert [each.place is None for each in sorted(facts.examples[EVIL], key=lambda e: e.key)] == [False, True]


def test_the_wall_is_the_same_for_any_number_of_workers_and_another_for_another_seed(directory):
    def keys(seed: int, workers: int) -> list[str]:
        return [place.key for place in gather([directory], seed=seed, wall=5, workers=workers).wall.items()]

    assert keys(0, 1) == keys(0, 3) and len(set(keys(0, 1))) == 5
    assert keys(0, 1) != keys(1, 1)


def test_untrusted_text_stays_text(directory, tmp_path, capsys):
    out = tmp_path / "out" / "audit.html"
    assert main([str(directory), "--out", str(out), "--workers", "1"]) == 0
    assert not check_inert(out.read_text()).inline["script"]
    assert "open it in any browser" in capsys.readouterr().out


def test_the_page_shows_each_section(directory, tmp_path):
    html = page([directory], gather([directory], wall=4), seed=0)
    text = Reader(html).text
    for words in ("From the list to the shards", "http_404", "bad.example", "cannot be decoded"):
        assert words in text, words
    assert "py3langid is not installed" in text  # gather was given no detector
    assert "no longer in these shards" in text
    assert "6 of 18 rows failed to download" in text
    pictures = [base64.b64decode(encoded) for encoded in re.findall(r"base64,([^\"]+)", html)]
    assert 4 <= len(pictures) <= 8
    assert all(max(Image.open(io.BytesIO(data)).size) <= 224 for data in pictures)


def test_a_page_of_texts_only(tmp_path):
    with ShardWriter(tmp_path / "t", samples_per_shard=4) as shards:
        shards.write("a", {"txt": b"one two three"})
    for parquet in (tmp_path / "t").glob("*.parquet"):
        parquet.unlink()
    html = page([tmp_path / "t"], gather([tmp_path / "t"]), seed=0)
    assert "no picture" in html and 'id="pictures"' not in html and 'id="failures"' not in html


def test_slices_of_a_list_are_audited_as_one(directory, tmp_path):
    other = tmp_path / "other"
    with ShardWriter(other, samples_per_shard=4) as shards:
        shards.write("a", {"jpg": picture(0)})
    write_step(other, "dedup", Step("dedup", 1, 0, {"exact_duplicate": 1}, time=2e9))
    facts = gather([directory, other])
    assert facts.samples == 13 and facts.equal_pictures.count() == 2
    assert facts.steps["dedup"].rows == 13 and facts.steps["dedup"].dropped["exact_duplicate"] == 2


def test_the_funnel_separates_dropping_from_naming():
    steps = {
        "filter_list": Step("filter_list", 100, 60, {"small": 40}, unit="rows"),
        "download": Step("download", 60, 50, {"http_404": 10}, unit="rows"),
        "filter_shards": Step("filter_shards", 50, 48, {"blank": 2}),
        "dedup": Step("dedup", 48, 43, {"exact_duplicate": 5}),  # without the blank ones
        "rewrite": Step("rewrite", 50, 43, {"exact_duplicate": 5, "blank": 2}),
    }
    bars = funnel(steps, 43)
    assert [bar.name for bar in bars] == list(steps)
    assert [bar.marks_only for bar in bars] == [False, False, True, True, False]
    assert [bar.flow for bar in bars] == [60, 50, 50, 50, 43] and [bar.width for bar in bars] == [100, 60, 50, 48, 50]
    assert [part[:3] for part in bars[4].parts] == [("kept", 43, 0), ("exact_duplicate", 5, 1), ("blank", 2, 3)]
    assert all(bar.parts[-1].x + bar.parts[-1].width == pytest.approx(100, abs=0.01) for bar in bars)


def test_a_damaged_parquet_or_record_is_an_error_that_names_it(directory, tmp_path, capsys):
    (directory / "00001.parquet").write_bytes(b"PAR1 no")
    assert main([str(directory), "--out", str(tmp_path / "a.html"), "--workers", "1"]) == 2
    assert "00001.parquet is damaged" in capsys.readouterr().err and not (tmp_path / "a.html").exists()
    (directory / "steps" / "dedup.json").write_text("{")
    assert main([str(directory), "--out", str(tmp_path / "a.html")]) == 2
    assert "dedup.json is not a step record" in capsys.readouterr().err
    assert main([str(directory), "--out", str(tmp_path / "a.html"), "--samples", "-1"]) == 2


def test_a_thumbnail_is_re_encoded(directory):
    (place,) = gather([directory], wall=1).wall.items()
    url, size = thumbnail(place)
    assert size == "150 x 100"
    assert base64.b64decode(url.partition(",")[2]) != Path(place.tar).read_bytes()[place.offset :][: place.size]


def test_sketches_know_their_error():
    top = TopCounter(10)
    for i in range(400):
        top.add({"often": 12, "second": 7, **{f"rare{i}-{j}": 1 for j in range(8)}})
    assert len(top) <= 10 and [name for name, _ in top.most(2)] == ["often", "second"]
    assert 400 * 12 - top.error <= dict(top.most(2))["often"] <= 400 * 12 and 0 < top.error < 2000
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**63, 20_000, dtype=np.uint64)
    for limit, error in ((10**6, 0), (1000, 0.03)):
        repeats = Repeats(limit)
        for part in np.split(rng.permutation(np.concatenate([hashes, hashes[:10_000]])), 10):
            repeats.add(part)
        assert repeats.exact == (error == 0)
        assert repeats.count() == pytest.approx(10_000, rel=3 * error) if error else repeats.count() == 10_000


def test_drawing_does_not_depend_on_the_order():
    names = [f"n{i}" for i in range(200)]
    one, two, rest = RandomSample(10), RandomSample(10), RandomSample(10)
    for name in names:
        one.add(lot(0, name), name, name)
    for i, name in enumerate(reversed(names)):
        (two if i % 2 else rest).add(lot(0, name), name, name)
    two.merge(rest)
    assert one.items() == two.items() and len(one.items()) == 10


def test_a_histogram_counts_outliers_in_its_end_bins():
    histogram = Histogram((0, 1, 2, 4))
    histogram.add(np.array([-5, 0, 0.5, 1, 3.9, 4, 99]))
    assert histogram.counts.tolist() == [3, 1, 3] and histogram.bin_of(0.5) == (1, 2)
    assert Facts().sides.bin_of(0.5) == (0, 0)
