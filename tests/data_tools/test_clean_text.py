"""data_tools.text.clean: what cleaning removes, and that each rule drops its documents and nothing else."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.text.clean import REPEATED_RUNS, TOP_RUN, TextRules, clean, normalise, repeated_runs, why_dropped

WORDS = [
    first + last for first in ("ri", "sto", "gar", "let", "mor", "win", "kit", "is") for last in ("ver", "ne", "den")
]


def line(seed: int) -> str:
    rng = random.Random(seed)
    return "The " + " ".join(rng.choice(WORDS) + rng.choice([" of", " and", "", "", ""]) for _ in range(25)) + "."


GOOD = "\n\n".join(map(line, range(8)))


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a\r\nb\rc\u2028d\x0be", "a\nb\nc\nd\ne"),
        ("nul\x00 bell\x07 c1\x9b bom\ufeff soft\xadhyphen zero\u200bwidth", "nul bell c1 bom softhyphen zerowidth"),
        ("right\u202eto left\u2069", "rightto left"),
        ("e\u0301", "\u00e9"),
        ("\ud800lone", "lone"),
        ("tab\t\xa0 wide\u3000space  ", "tab wide space"),
        (" a \n \n \n b ", "a\n\nb"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"),
        ("Born[12] in[citation needed] Rome.[Edit]", "Born in Rome."),
        ("Enable JavaScript.\nReal text.\nSee our Privacy Policy", "Real text."),
        ("\x00\u200b \n\t", ""),
    ],
)
def test_what_cleaning_removes(raw, cleaned):
    assert clean(raw) == cleaned


def test_a_document_in_one_line_is_not_boilerplate():
    whole = GOOD.replace("\n", " ") + " They wrote it in JavaScript."
    assert clean(whole) == normalise(whole)


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.text())
def test_no_visible_character_is_lost(text):
    seen = "".join(char for char in text if char.isalnum())
    assert len("".join(normalise(text).split())) >= len("".join(normalise(seen).split()))


def test_a_megabyte_of_combining_marks_is_fast():
    start = time.process_time()
    assert len(normalise("a" + "\u0315\u0300" * 250_000 + "\U0001d165" * 100_000)) <= 31
    assert time.process_time() - start < 5  # sorting all of them would take an hour


def test_good_prose_passes():
    assert why_dropped(GOOD, TextRules(), english=True) is None


BAD = {
    "empty": "",
    "placeholder": GOOD + " Lorem Ipsum dolor",
    "too_short": "The garden and the river.",
    "word_length": " ".join(word + "abcdefgh" for word in GOOD.split()) + " the of",
    "symbols": GOOD + " #tag" * 60,
    "bullets": "\n".join("- " + part for part in GOOD.split("\n\n")),
    "ellipses": "\n".join(part + "..." for part in GOOD.split("\n\n")),
    "stop_words": " ".join(random.Random(1).choices(WORDS, k=60)),
    "letters": GOOD + " 1234" * 100,
    "repeated_lines": "\n".join([GOOD.split("\n\n")[0]] * 3 + GOOD.split("\n\n")),
    "repeated_runs": GOOD + "\n\n" + " ".join(GOOD.split("\n\n")[:4]),
}
RULES = {
    "too_short": {"min_words": None},
    "word_length": {"min_word_length": None, "max_word_length": None},
    "symbols": {"max_symbols": None, "max_repeated_runs": None},
    "bullets": {"max_bullets": None},
    "ellipses": {"max_ellipses": None, "max_symbols": None},
    "stop_words": {"min_stop_words": None, "max_repeated_runs": None},
    "letters": {"min_letters": None, "max_repeated_runs": None},
    "repeated_lines": {"max_repeated_lines": None, "max_repeated_characters": None, "max_repeated_runs": None},
    "repeated_runs": {"max_repeated_runs": None},
}


@pytest.mark.parametrize("reason", BAD)
def test_each_rule_drops_its_documents_and_can_be_turned_off(reason):
    text = clean(BAD[reason])
    violation = why_dropped(text, TextRules(), english=True)
    assert violation is not None and violation[0] == reason, violation
    if reason in RULES:
        assert why_dropped(text, replace(TextRules(), **RULES[reason]), english=True) is None


def test_stop_words_are_required_only_in_english():
    assert why_dropped(BAD["stop_words"], replace(TextRules(), max_repeated_runs=None), english=False) is None


def test_the_detail_says_what_was_measured_and_allowed():
    assert why_dropped("five words are too few", TextRules(), english=True) == ("too_short", "5, the minimum is 50")


def _slow_repeated_runs(words: list[str]) -> float:
    """Gopher's table A1 word for word, for words of one length."""
    total, worst = sum(map(len, words)), 0.0
    for n in range(2, 11):
        runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        most = max(map(runs.count, runs), default=0)
        if n in TOP_RUN and most > 1:
            worst = max(worst, most * n * len(words[0]) / total / TOP_RUN[n])
        if n in REPEATED_RUNS:
            covered = {i + k for i, run in enumerate(runs) if run in runs[:i] for k in range(n)}
            worst = max(worst, sum(len(words[i]) for i in covered) / total / REPEATED_RUNS[n])
    return worst


@given(st.lists(st.sampled_from(["aa", "bb", "cc"]), min_size=1, max_size=40))
def test_repeated_runs_match_a_literal_count(words):
    assert repeated_runs(words) == pytest.approx(_slow_repeated_runs(words))
