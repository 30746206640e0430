"""data_tools.text.duplicates: what counts as the same text, which one is kept, and which near duplicates are found."""

from __future__ import annotations

import random
import sys

import pytest

from data_tools.text.duplicates import KeptTexts, bands, comparable, digest, runs, signature


def words(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f"w{rng.randrange(5000)}" for _ in range(count)]


def add(kept_texts: KeptTexts, number: int, text: list[str]):
    return kept_texts.add(number, digest(text, ""), signature(text))


@pytest.mark.parametrize(
    "other", ["the cat, sat on THE mat", "The  cat\nsat on the mat!", "\uff34\uff48\uff45 cat sat on the mat"]
)
def test_case_punctuation_and_width_are_ignored(other):
    assert digest(comparable(other), other) == digest(comparable("The cat sat on the mat."), "")


def test_texts_without_words_are_compared_as_they_are():
    assert comparable("!!! ???") == []
    assert digest([], "!!!") != digest([], "???")


@pytest.mark.parametrize("near", [0.8, 1.0])
def test_the_first_is_kept_and_named(near):
    kept_texts = KeptTexts(near)
    first = words(100, 0)
    assert add(kept_texts, 7, first) is None
    assert add(kept_texts, 8, words(100, 1)) is None
    assert add(kept_texts, 9, first) == ("duplicate", 7)
    assert add(kept_texts, 10, words(100, 1)) == ("duplicate", 8)


def test_one_changed_word_is_a_near_duplicate_and_half_a_text_is_none():
    kept_texts = KeptTexts(0.8)
    first = words(400, 0)
    assert add(kept_texts, 1 << 40, first) is None
    assert add(kept_texts, 2, [*first[:200], "new", *first[201:]]) == ("near_duplicate", 1 << 40)
    assert add(kept_texts, 3, [*first[:200], *words(200, 5)]) is None
    assert add(KeptTexts(1.0), 4, first) is None


def test_dropped_texts_have_no_duplicates():
    kept_texts = KeptTexts(0.8)
    first = words(400, 0)
    near, far = [*first[30:], *words(30, 1)], [*first[90:], *words(90, 1)]
    assert add(kept_texts, 1, first) is None
    assert add(kept_texts, 2, near) == ("near_duplicate", 1)
    # Like the second, which was dropped, and not like the first.
    assert add(kept_texts, 3, far) is None
    assert add(KeptTexts(0.8), 3, far) is None


def test_planted_near_duplicates_are_found_and_others_are_not():
    """A similarity of 0.9 is found nearly always, 0.6 hardly ever (the standard deviation is 0.03 to 0.04)."""
    hits = {0.9: 0, 0.6: 0}
    for similarity in hits:
        for seed in range(100):
            # Of two sets of n runs that share s, the Jaccard similarity is s / (2n - s).
            length = 300
            shared = round(2 * length * similarity / (1 + similarity))
            text = words(length, 1000 + seed)
            kept_texts = KeptTexts(0.8)
            add(kept_texts, 0, text)
            hits[similarity] += add(kept_texts, 1, [*text[:shared], *words(length - shared, 5000 + seed)]) is not None
    assert hits[0.9] >= 97 and hits[0.6] <= 3, hits


def test_runs_of_five_words():
    assert runs(list("abcdef")) == ["a b c d e", "b c d e f"]
    assert runs(list("abc")) == ["a b c"]
    assert runs([]) == [""]


@pytest.mark.parametrize("near", [0.3, 0.5, 0.7, 0.8, 0.9, 0.99])
def test_the_bands_find_nine_of_ten_pairs_at_the_threshold(near):
    count = bands(near)
    assert 128 % count == 0
    assert 1 - (1 - near ** (128 // count)) ** count >= 0.9


@pytest.mark.parametrize("near", [0.0, -1, 1.5, float("nan")])
def test_an_invalid_threshold_is_refused(near):
    with pytest.raises(ValueError, match="not between"):
        KeptTexts(near)


def test_without_the_library_exact_ones_are_still_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ValueError, match="not installed"):
        KeptTexts(0.8)
    kept_texts = KeptTexts(1.0)
    assert kept_texts.add(1, b"x", b"") is None
    assert kept_texts.add(2, b"x", b"") == ("duplicate", 1)
