"""Cleans a document, and says why it is not worth training on: small pure functions after C4 and Gopher.

C4 is arXiv 1910.10683, section 2.2; Gopher is arXiv 2112.11446, appendix A1. Three rules of C4 are not used: that a
line must end in a full stop (it empties books with hard line breaks), its list of bad words, and that a curly bracket
drops the page.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

# Controls, soft hyphens, zero-width spaces, direction marks, lone surrogates, byte order marks, non-characters.
# Not the zero-width joiners, which Persian, Hindi and emoji need.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ud800-\udfff"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_MARKS = 30  # combining marks in a row, as in stream-safe text (UAX 15); sorting them is quadratic
_ABOVE_16_BITS = re.compile("[\U00010000-\U0010ffff]")
_LINE_BREAK = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
_BLANKS = re.compile(r"[^\S\n]+")
_AROUND_BREAK = re.compile(r" ?\n ?")
_GAPS = re.compile(r"\n{3,}")

_MARKERS = re.compile(r"\[(?:\d{1,4}|edit|citation needed)\]", re.IGNORECASE)
_BOILERPLATE = (
    *("javascript", "terms of use", "privacy policy"),
    *("cookie policy", "uses cookies", "use of cookies", "use cookies"),
)
# A longer line, such as a whole document in one line, is not boilerplate, whatever it mentions.
_BOILERPLATE_WORDS = 60
_BULLETS = ("•", "‣", "◦", "▪", "●", "-", "*", "\u2013")
_ELLIPSES = ("...", "…")
_SYMBOLS = re.compile(r"#|\.\.\.|…")
_LETTER = re.compile(r"[^\W\d_]")
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))

# Gopher's table A1: words in a run -> the largest allowed share of the document's characters.
TOP_RUN = {2: 0.20, 3: 0.18, 4: 0.16}
REPEATED_RUNS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}


@dataclass(frozen=True)
class TextRules:
    """The limits for a good document, all Gopher's; None turns one off. Words are separated by blanks, so turn off the
    rules on words for languages without blanks."""

    min_words: float | None = 50
    min_word_length: float | None = 3  # characters, the mean of the document
    max_word_length: float | None = 10
    max_symbols: float | None = 0.1  # "#" and "..." per word
    max_bullets: float | None = 0.9  # share of lines
    max_ellipses: float | None = 0.3  # share of lines that end in one
    min_letters: float | None = 0.8  # share of words with a letter
    min_stop_words: float | None = 2  # of STOP_WORDS; English only
    max_repeated_lines: float | None = 0.3  # share of lines, and of paragraphs
    max_repeated_characters: float | None = 0.2  # share of characters in such lines, and in such paragraphs
    max_repeated_runs: float | None = 1.0  # times the shares of TOP_RUN and REPEATED_RUNS


def normalise(text: str) -> str:
    """Composed Unicode (NFC) without invisible characters; every kind of line break is a newline, at most two in a row;
    every run of blanks is one space, with none at the ends of a line."""
    text = _INVISIBLE.sub("", _LINE_BREAK.sub("\n", text))
    if not text.isascii():
        # In `re`, a character class up to 16 bits is a bitmap, beyond that a list to search, 30 times slower.
        marks = _excess_marks(sys.maxunicode if _ABOVE_16_BITS.search(text) else 0xFFFF)
        text = unicodedata.normalize("NFC", marks.sub(r"\1", text))
    text = _AROUND_BREAK.sub("\n", _BLANKS.sub(" ", text))
    return _GAPS.sub("\n\n", text).strip()


@cache
def _excess_marks(highest: int) -> re.Pattern[str]:
    """Matches a run of more than 30 combining marks, none above `highest`; group 1 are the first 30."""
    marks = "".join(char for char in map(chr, range(highest + 1)) if unicodedata.combining(char))
    return re.compile(f"([{marks}][{marks}]{{{_MARKS - 1}}})[{marks}]+")


def without_markers(text: str) -> str:
    """C4: removes Wikipedia's [12], [edit] and [citation needed]."""
    return _MARKERS.sub("", text)


def without_boilerplate(text: str) -> str:
    """C4: removes lines that mention JavaScript, cookies or terms of use, unless they are longer than such notices
    are."""
    if not _mentions_boilerplate(text):
        return text
    lines = text.split("\n")
    return "\n".join(
        line for line in lines if not _mentions_boilerplate(line) or len(line.split()) > _BOILERPLATE_WORDS
    )


def _mentions_boilerplate(text: str) -> bool:
    lower = text.lower()
    return any(notice in lower for notice in _BOILERPLATE)


def clean(text: str) -> str:
    """Applies all of the above. Not idempotent: removing a text may join its neighbours into a new match."""
    text = normalise(text)
    shorter = without_boilerplate(without_markers(text))
    return text if shorter == text else normalise(shorter)


def why_dropped(text: str, rules: TextRules, english: bool) -> tuple[str, str] | None:
    """(reason, measured value) of the first rule that a cleaned text breaks; None for a good text."""
    if not text:
        return "empty", ""
    if "lorem ipsum" in text.lower():  # C4
        return "placeholder", "lorem ipsum"
    for reason, value, least, most in _measures(text, rules, english):
        if least is not None and value < least:
            return reason, f"{value:.3g}, the minimum is {least:g}"
        if most is not None and value > most:
            return reason, f"{value:.3g}, the maximum is {most:g}"
    return None


def _measures(text: str, rules: TextRules, english: bool) -> Iterator[tuple[str, float, float | None, float | None]]:
    """(reason, value, minimum, maximum), the cheapest first."""
    words = text.split()
    yield "too_short", len(words), rules.min_words, None
    yield "word_length", mean_word_length(words), rules.min_word_length, rules.max_word_length
    yield "symbols", symbols_per_word(text, words), None, rules.max_symbols
    lines = [line for line in text.split("\n") if line]
    yield "bullets", share(lines, _BULLETS, str.startswith), None, rules.max_bullets
    yield "ellipses", share(lines, _ELLIPSES, str.endswith), None, rules.max_ellipses
    if english:
        yield "stop_words", stop_words(words), rules.min_stop_words, None
    yield "letters", share_with_letter(words), rules.min_letters, None
    for parts in (lines, text.split("\n\n")):
        by_count, by_characters = repeated(parts)
        yield "repeated_lines", by_count, None, rules.max_repeated_lines
        yield "repeated_lines", by_characters, None, rules.max_repeated_characters
    if rules.max_repeated_runs is not None:
        yield "repeated_runs", repeated_runs(words), None, rules.max_repeated_runs


def mean_word_length(words: list[str]) -> float:
    return sum(map(len, words)) / max(len(words), 1)


def symbols_per_word(text: str, words: list[str]) -> float:
    """Gopher: hash signs and ellipses per word."""
    return len(_SYMBOLS.findall(text)) / max(len(words), 1)


def share(lines: list[str], marks: tuple[str, ...], test) -> float:
    """The share of lines that start, or end, with one of the marks."""
    return sum(test(line, marks) for line in lines) / max(len(lines), 1)


def stop_words(words: list[str]) -> int:
    """How many of Gopher's eight English words occur."""
    occurring: set[str] = set()
    for word in words:
        if (lower := word.lower()) in STOP_WORDS:
            occurring.add(lower)
            if len(occurring) == len(STOP_WORDS):
                break
    return len(occurring)


def share_with_letter(words: list[str]) -> float:
    return sum(_LETTER.search(word) is not None for word in words) / max(len(words), 1)


def repeated(parts: list[str]) -> tuple[float, float]:
    """The share of lines or paragraphs that repeat an earlier one of the document, by number and by characters."""
    counts = Counter(parts)
    repeats = sum((count - 1) * len(part) for part, count in counts.items())
    characters = sum(map(len, parts))
    return (len(parts) - len(counts)) / max(len(parts), 1), repeats / max(characters, 1)


def repeated_runs(words: list[str]) -> float:
    """How much repeated runs of 2 to 10 words exceed Gopher's limits: the largest share / limit, 1 at the limit.

    The share of all characters, without blanks: for 2 to 4 words that of the most frequent run, for 5 to 10 that of all
    runs that repeat an earlier one (each character counted once).
    """
    numbers: dict[str, int] = {}
    ids = np.array([numbers.setdefault(word, len(numbers)) for word in words], np.int64)
    lengths = np.array([len(word) for word in words], np.int64)
    total, worst, runs = max(int(lengths.sum()), 1), 0.0, ids
    for n in range(2, min(max(REPEATED_RUNS), len(words)) + 1):
        # A run's number is exact, not a hash: it combines the number of its first n - 1 words and of its last word.
        joined = runs[:-1] * len(numbers) + ids[n - 1 :]
        _, first, runs, counts = np.unique(joined, return_index=True, return_inverse=True, return_counts=True)
        if len(counts) == len(joined):  # all are different, and so are longer runs
            break
        if n in TOP_RUN:
            top = first[counts.argmax()]
            if counts.max() > 1:
                worst = max(worst, counts.max() * lengths[top : top + n].sum() / total / TOP_RUN[n])
        else:
            repeats = np.ones(len(joined), bool)
            repeats[first] = False
            covered = np.zeros(len(words), bool)
            for shift in range(n):
                covered[shift : shift + len(repeats)] |= repeats
            worst = max(worst, lengths[covered].sum() / total / REPEATED_RUNS[n])
    return float(worst)
