"""data_tools.lists.filters and caption_rules: each filter drops what its name says and nothing else."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from data_tools.lists.caption_rules import JUNK
from data_tools.lists.filters import (
    ListSettings,
    above,
    bad_url,
    below,
    blocked_domain,
    caption_too_long,
    caption_too_short,
    describe_values,
    extreme_aspect,
    hosts_of,
    make_filters,
    other_language_detected,
    other_language_listed,
    too_small,
)
from data_tools.lists.languages import UNKNOWN, detector
from data_tools.lists.url_set import UrlSet
from tests.toys import needs

GOOD = [
    "a red bicycle leaning on a wall",
    "Nike Air Max 90, 2019",
    "Photo of a dog",
    "iPhone 12 Pro 128GB",
    "赤い自転車と白い壁",
    "Привет из Москвы",
    "New New York, New York skyline at night",
    "<3 my cat",
    "Aaaah! The sea.",
    "Buy a house in Donaudampfschifffahrtsgesellschaft street",
    "U.S. Route 66",
    "image de chat",
    "smile :-) and 100% cotton",
]
BAD = {
    "caption_is_url": ["https://a.example/b c"[:20], "www.shop.example", "photos.example.com", "HTTP://X.Y/z.jpg"],
    "caption_is_filename": ["red-shoes.JPG", "IMG_1234", "DSC 0042", "Screenshot 2020-03-01 at 12.03.12", "image 12"],
    "caption_without_letters": ["12345", "- 12/34 -", "★★★", "2019-04-03 12:00"],
    "caption_few_letters": ["12x18cm 3/4 (004)", "4.5 x 6.7 - 12345/67 (A)"],
    "caption_boilerplate": ["Stock Photo", "image for", "Click to view larger image", "no image available!", "Logo"],
    "caption_markup": ["<b>sale</b> of shoes", "{{ product.title }} shoe", "a shoe [/caption]", "go javascript:void"],
    "caption_same_character": [
        "what aaaaaaaaaaa day",
        "a sale of winter shoes ---------------- now",
        "ZZZZZZZZZ of cats",
    ],
    "caption_repeats_words": ["buy now buy now buy now", "Car car CAR car car car"],
    "caption_long_token": ["cat " + "a1b2" * 10, "red-bicycle-leaning-on-the-wall-of-an-old-house"],
}


def batch(**columns) -> pa.RecordBatch:
    n = len(next(iter(columns.values())))
    kinds = {"url": pa.string(), "caption": pa.string(), "language": pa.string()}
    all_columns = {"row": list(range(n)), "url": ["http://a.example/b"] * n, "caption": ["a cat"] * n, **columns}
    return pa.RecordBatch.from_pydict({k: pa.array(v, kinds.get(k)) for k, v in all_columns.items()})


@pytest.mark.parametrize("name", JUNK)
def test_each_junk_rule_finds_its_captions_first_and_no_good_one(name):
    captions = pa.array(BAD[name])
    reasons = np.full(len(captions), "", object)
    for rule in reversed(JUNK):
        reasons[JUNK[rule](captions)] = rule
    assert reasons.tolist() == [name] * len(captions)
    assert JUNK[name](pa.array([*GOOD, ""])).tolist() == [False] * (len(GOOD) + 1)


def test_junk_rules_work_on_slices_and_on_nothing():
    captions = pa.array([*GOOD, "12x18cm 3/4 (004)"])
    for rule in JUNK.values():
        assert rule(captions.slice(3)).tolist() == rule(captions).tolist()[3:]
        assert rule(pa.array([], pa.string())).tolist() == []


def test_urls_without_a_server_are_bad():
    bad = [
        "file:///etc/passwd",
        "data:image/png;base64,AA",
        "ftp://a.example/b",
        "http://",
        "http:///x.jpg",
        "a.example/b",
    ]
    bad += [
        "http://a.example/b\nc.jpg",
        "http://a b/",
        "http://a.example x/c",
        "http://a .example",
        "gopher://a",
        "javascript:x",
    ]
    good = [
        "http://a.example",
        "HTTPS://A.example:8080/b?c=d#e",
        "http://user@a.example/b",
        "http://bücher.example/ü.jpg",
        "http://a.example/b c.jpg",
        "http://a.example:80/b?c d",
    ]
    assert bad_url(batch(url=bad + good)).tolist() == [True] * len(bad) + [False] * len(good)


def test_a_domain_blocks_its_subdomains_and_not_similar_names():
    urls = ["http://b.example/x", "https://A.B.EXAMPLE:80/x", "http://ab.example/x", "http://b.example.org/x"]
    urls += ["http://b.example@c.example/x", "http://c.example/b.example", "http://b.example./x", "no url"]
    blocked = blocked_domain(batch(url=urls), frozenset({"b.example"}))
    assert blocked.tolist() == [True, True, False, False, False, False, True, False]
    unicode = ["http://bücher.example/x", "http://a.b%C3%BCcher.example/x", "http://xn--bcher-kva.example/x"]
    for name in ("bücher.example", "xn--bcher-kva.example"):
        assert blocked_domain(batch(url=[*unicode, "http://bucher.example/x"]), frozenset({name})).sum() == 3
    assert hosts_of(pa.array(urls)).to_pylist()[:2] == ["b.example", "a.b.example"]


def test_thresholds_keep_their_own_value_and_drop_what_is_missing():
    numbers = batch(x=[0.29, 0.3, 0.31, None, float("nan")])
    assert below(numbers, "x", 0.3).tolist() == [True, False, False, True, True]
    assert above(numbers, "x", 0.3).tolist() == [False, False, True, True, True]
    sizes = batch(width=[200, 199, 600, 601, None, 0], height=[200, 900, 200, 200, 200, 0])
    assert too_small(sizes, 200).tolist() == [False, True, False, False, True, True]
    assert extreme_aspect(sizes, 3).tolist() == [False, True, False, True, True, False]
    assert describe_values(sizes, ("width", "height"))[3:5] == ["601 x 200", "null x 200"]


def test_lengths_of_captions():
    captions = batch(caption=["a   b", "a b c", "自転車", "赤 い", "\u00a0", "word " * 400])
    assert caption_too_short(captions, words=3, chars=0).tolist() == [True, False, False, True, True, False]
    assert caption_too_short(captions, words=0, chars=4).tolist() == [False, False, True, True, True, False]
    assert caption_too_long(captions, most=5).tolist() == [False, False, False, False, False, True]


def test_the_language_of_the_list_counts_in_any_spelling():
    languages = batch(language=["en", "EN-us", "de", None, "", "eng"])
    wanted = frozenset({"en"})
    assert other_language_listed(languages, wanted).tolist() == [False, False, True, True, True, True]


def test_captions_of_uncertain_language_pass():
    fake = {"ein Hund": "de", "a dog": "en", "Paris": UNKNOWN}
    mask = other_language_detected(batch(caption=list(fake)), frozenset({"en"}), lambda texts: [fake[t] for t in texts])
    assert mask.tolist() == [True, False, False]


def test_the_detector_tells_languages_apart():
    needs("py3langid")
    texts = [
        "Ein rotes Fahrrad lehnt an einer Mauer",
        "a red bicycle leaning on a wall",
        "красный автомобиль",
        "",
        "12345",
    ]
    assert detector()(texts) == ["de", "en", "ru", UNKNOWN, UNKNOWN]


def test_without_the_detector_the_filter_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)
    with pytest.raises(ValueError, match=r"py3langid.*not installed; pip install"):
        make_filters(ListSettings(language=("en",)), ("row", "url", "caption"))
    assert (
        make_filters(ListSettings(language=("en",)), ("row", "url", "caption", "language"))[-1].name == "other_language"
    )


def test_a_missing_column_is_named_with_the_existing_ones():
    with pytest.raises(
        ValueError, match=r"--min-similarity needs the column similarity, but the list has row, url, cap"
    ):
        make_filters(ListSettings(min_similarity=0.3), ("row", "url", "caption"))
    with pytest.raises(ValueError, match="--min-side needs the column height, but"):
        make_filters(ListSettings(min_side=10), ("row", "url", "caption", "width"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_punsafe": 2}, r"--max-punsafe=2 is not a probability"),
        ({"min_similarity": 30}, "--min-similarity=30 is not a cosine"),
        ({"max_aspect": float("nan")}, "--max-aspect=nan is below 1"),
        ({"min_caption_words": 501}, "above 500"),
    ],
)
def test_thresholds_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ListSettings(**settings)


def test_the_first_of_equal_urls_stays_however_they_are_cut_into_batches():
    rng = np.random.default_rng(0)
    urls = [f"http://a.example/{i}" for i in rng.integers(0, 900, 3000)]
    expected = [url in urls[:i] for i, url in enumerate(urls)]
    for size in (7, 100, 3000):
        url_set = UrlSet()
        repeats = [url_set.add(pa.array(urls[i : i + size])) for i in range(0, len(urls), size)]
        assert np.concatenate(repeats).tolist() == expected
        assert len(url_set) == len(set(urls))
