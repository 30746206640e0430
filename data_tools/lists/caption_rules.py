"""Rules for captions that say nothing about their picture: pyarrow text array -> bool [rows], True = junk.

Each rule has a name, which is the reason that dropped captions count under. The rules look for what alt texts on the
web really contain: file names, addresses, template code, "click to enlarge".
"""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_lowercase

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.lists.columns import as_bools

FEWEST_LETTERS = 0.4  # share of the non-blank characters
REPEATS_FROM = 6  # words; in shorter captions a repetition may be a name
MOST_WORDS_PER_KIND = 3  # ordinary text uses each word less often on average
SAME_CHARACTER = 8  # in a row
LONG_TOKEN = 40  # characters; the longest English words have 30

_ADDRESS = r"(?i)^\s*(?:(?:https?://|www\.)\S*|[\w@.-]+\.(?:com|net|org|info|biz|io|edu|gov|ru|de|fr|cn|jp|co\.uk)(?:/\S*)?)\s*$"
_FILE = (
    r"(?i)^\s*\S+\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?|svg|heic|avif|psd|raw|pdf|html?|php|aspx?|mp4|mov)\s*$"
    # names that cameras and phones give: IMG_1234, DSC 0042, Screenshot 2020-03-01 at 12.03.12
    r"|^\s*(?:img|image|dscn?|dscf|pict?|pxl|photo|screen ?shot|gopr|cimg|hpim|sam|mvc|wp|vid|p|untitled)"
    r"[\s_#(-]*\d[\d\s_.:()T-]*(?:at[\d\s.:]+|copy|edit(?:ed)?)?\s*$"
)
# A caption made only of these words, digits and symbols belongs to the page, not to the picture.
_PAGE_WORDS = (
    r"photo|photos|photograph|photography|picture|pictures|pic|pics|image|images|img|thumbnail|thumb|logo|icon|banner|"
    r"avatar|slide|slideshow|gallery|cover|poster|stock|product|products|main|featured|feature|profile|header|hero|"
    r"default|background|article|post|blog|related|additional|alternate|full|large|larger|big|small|no|missing|the|a|"
    r"an|this|your|our|free|download|view|click|see|show|zoom|enlarge|expand|for|of|in|to|on|from|by|with|and|or|size|"
    r"here|more|available|not|found|preview|vector|royalty|alt|text|title|caption|description|placeholder|loading|"
    r"untitled|unnamed|undefined|null|none|nan|na|test|blank|empty|attachment|file|upload|uploaded|screenshot|close|"
    r"next|previous|open|share|print|menu|home|advertisement|ad|sponsored|watermark|coming|soon|is|it|item|number"
)
_BOILERPLATE = rf"(?i)^[^\p{{L}}]*(?:(?:{_PAGE_WORDS})(?:[^\p{{L}}]+|$))+$"
_MARKUP = r"(?i)</?[a-z!][^<>]*>|&lt;|\{\{|\}\}|\$\{|\{%|<\?php|javascript:|\bfunction\s*\(|\[/?caption"
_SAME = "|".join(rf"{c}{{{SAME_CHARACTER},}}" for c in ascii_lowercase) + rf"|[[:punct:]]{{{2 * SAME_CHARACTER},}}"

# A non-ASCII character counts once, by its first byte.
_BYTES = np.arange(256)
_FIRST = (_BYTES < 0x80) | (_BYTES >= 0xC0)
_SOLID = _FIRST & (_BYTES > 0x20) & (_BYTES != 0x7F)
_LETTERS = (_BYTES >= 0xC0) | np.array([chr(b).isalpha() and b < 0x80 for b in range(256)])


def is_address(captions: pa.Array) -> np.ndarray:
    """The whole caption is a URL or a server name."""
    return _matches(captions, _ADDRESS)


def is_filename(captions: pa.Array) -> np.ndarray:
    """red-shoes.jpg, IMG_1234, DSC 0042."""
    return _matches(captions, _FILE)


def without_letters(captions: pa.Array) -> np.ndarray:
    """Only digits and punctuation. Not the empty text, which is the only caption in a list of pictures alone."""
    return ~_matches(captions, r"^$|\p{L}")


def few_letters(captions: pa.Array) -> np.ndarray:
    """Less than FEWEST_LETTERS of the non-blank characters are letters: 12x18cm 3/4 (004). All characters outside ASCII
    count as letters."""
    letters, solid = count_bytes(captions, _LETTERS), count_bytes(captions, _SOLID)
    return letters < FEWEST_LETTERS * solid


def count_bytes(texts: pa.Array, wanted: np.ndarray) -> np.ndarray:
    """int64 [rows]: how many bytes of each text are `wanted` (bool [256]). Ten times faster than counting by a regular
    expression."""
    _, ends, data = texts.buffers()
    if len(texts) == 0 or data is None:
        return np.zeros(len(texts), np.int64)
    place = np.frombuffer(ends, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    low, high = int(place[0]), int(place[-1])
    before = np.zeros(high - low + 1, np.int64)
    np.cumsum(wanted[np.frombuffer(data, np.uint8)[low:high]], out=before[1:])
    return np.diff(before[place - low])


def is_boilerplate(captions: pa.Array) -> np.ndarray:
    """Every word is one of _PAGE_WORDS: "image for", "Stock Photo", "click to view larger image"."""
    return _matches(captions, _BOILERPLATE)


def has_markup(captions: pa.Array) -> np.ndarray:
    """Tags, script, and templates that were not filled in."""
    return _matches(captions, _MARKUP)


def same_character(captions: pa.Array) -> np.ndarray:
    """aaaaaaaa, ----------------"""
    return _matches(captions, f"(?i){_SAME}")


def repeats_words(captions: pa.Array) -> np.ndarray:
    """At least REPEATS_FROM words, each at least MOST_WORDS_PER_KIND times on average: buy now buy now ..."""
    junk = np.zeros(len(captions), bool)
    blanks = pc.count_substring(captions, " ")
    candidates = np.flatnonzero(as_bools(pc.greater_equal(blanks, REPEATS_FROM - 1)))
    for row, text in zip(candidates.tolist(), captions.take(pa.array(candidates)).to_pylist(), strict=True):
        words = text.lower().split()
        junk[row] = len(words) >= REPEATS_FROM and MOST_WORDS_PER_KIND * len(set(words)) <= len(words)
    return junk


def long_token(captions: pa.Array) -> np.ndarray:
    """A run of LONG_TOKEN letters and digits without a blank: a hash, base64, a URL slug."""
    return _matches(captions, rf"[A-Za-z0-9+/=_-]{{{LONG_TOKEN},}}")


# In the order in which they are applied; a caption counts under the first that matches.
JUNK: dict[str, Callable[[pa.Array], np.ndarray]] = {
    "caption_is_url": is_address,
    "caption_is_filename": is_filename,
    "caption_without_letters": without_letters,
    "caption_few_letters": few_letters,
    "caption_boilerplate": is_boilerplate,
    "caption_markup": has_markup,
    "caption_same_character": same_character,
    "caption_repeats_words": repeats_words,
    "caption_long_token": long_token,
}


def _matches(captions: pa.Array, pattern: str) -> np.ndarray:
    return as_bools(pc.match_substring_regex(captions, pattern))
