"""Filters of a list of URLs and captions: each a small pure function, pyarrow.RecordBatch -> bool [rows], True = drop.

Batches are those of lists.reading (url, caption, and similarity, punsafe, pwatermark, width, height, language if the
list has them); their texts are UTF-8 without NUL. `make_filters` returns the requested filters in their order; a row
counts under the first that drops it. A filter also drops the rows that lack the number or language it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_tools.fetch.urls import ascii_host
from data_tools.lists.caption_rules import JUNK
from data_tools.lists.columns import as_bools
from data_tools.lists.languages import UNKNOWN, detector, language_code

_MOST_WORDS = 500  # RE2, the engine below, allows up to 1000 repetitions
_DETAIL = 200  # characters of a value in a drop's detail
# The server's name, after an optional user name, which might imitate one.
_HOST = r"^(?i:https?)://(?:[^/?#\\@]*@)?(?P<host>[^/?#\\:@\s]+)"
# Scripts without blanks between words: each character counts as a word.
_SOLID_SCRIPTS = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}"
_WORD = rf"[{_SOLID_SCRIPTS}]|[^\s{_SOLID_SCRIPTS}]+"

Drops = Callable[[pa.RecordBatch], np.ndarray]


class Filter(NamedTuple):
    name: str  # the reason that dropped rows count under
    drops: Drops
    details: Callable[[pa.RecordBatch], list[str]]  # of dropped rows: the value that was too low, too long ...


@dataclass(frozen=True)
class ListSettings:
    """The thresholds of the filters; None, () and False turn one off."""

    min_similarity: float | None = None
    max_punsafe: float | None = None
    max_pwatermark: float | None = None
    min_side: int | None = None
    max_aspect: float | None = None
    min_caption_words: int | None = None
    min_caption_chars: int | None = None
    max_caption_chars: int = 2000
    keep_junk_captions: bool = False
    language: tuple[str, ...] = ()
    blocked_domains: tuple[str, ...] = ()
    unique_urls: bool = False

    def __post_init__(self) -> None:
        for name in ("min_side", "max_aspect", "min_caption_words", "min_caption_chars", "max_caption_chars"):
            if (value := getattr(self, name)) is not None and not value >= 1:
                raise ValueError(f"--{name.replace('_', '-')}={value} is below 1; use 1 or more, or omit it")
        if (self.min_caption_words or 0) > _MOST_WORDS:
            raise ValueError(
                f"--min-caption-words={self.min_caption_words} is above {_MOST_WORDS}; no caption has that many"
            )
        for name in ("max_punsafe", "max_pwatermark"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name.replace('_', '-')}={value} is not a probability; use 0 to 1")
        if (value := self.min_similarity) is not None and not -1 <= value <= 1:
            raise ValueError(f"--min-similarity={value} is not a cosine; use -1 to 1, such as 0.3")


def make_filters(settings: ListSettings, columns: Sequence[str]) -> list[Filter]:
    """The filters that `settings` turn on, in the order in which they are applied. Raises ValueError for a column that
    the list does not have, naming those it has. UrlSet, not a filter, finds duplicate URLs."""

    def needs(option: str, *names: str) -> None:
        if missing := [name for name in names if name not in columns]:
            raise ValueError(
                f"--{option} needs the column {' and '.join(missing)}, but the list has {', '.join(columns)}; leave "
                "the option out, or choose the --preset that fits the list"
            )

    s = settings
    filters = [
        Filter("bad_url", bad_url, partial(describe_values, names=("caption",))),
        Filter("caption_too_long", partial(caption_too_long, most=s.max_caption_chars), caption_length),
    ]
    for option, reason, drops, column, threshold in (
        ("min-similarity", "low_similarity", below, "similarity", s.min_similarity),
        ("max-punsafe", "unsafe", above, "punsafe", s.max_punsafe),
        ("max-pwatermark", "watermark", above, "pwatermark", s.max_pwatermark),
    ):
        if threshold is not None:
            needs(option, column)
            filters.append(
                Filter(
                    reason, partial(drops, name=column, threshold=threshold), partial(describe_values, names=(column,))
                )
            )
    sides = partial(describe_values, names=("width", "height"))
    if s.min_side is not None:
        needs("min-side", "width", "height")
        filters.append(Filter("too_small", partial(too_small, least=s.min_side), sides))
    if s.max_aspect is not None:
        needs("max-aspect", "width", "height")
        filters.append(Filter("extreme_aspect", partial(extreme_aspect, most=s.max_aspect), sides))
    if s.blocked_domains:
        blocked = frozenset(s.blocked_domains)
        filters.append(Filter("blocked_domain", partial(blocked_domain, domains=blocked), describe_hosts))
    return filters + _caption_filters(s, columns)


def _caption_filters(s: ListSettings, columns: Sequence[str]) -> list[Filter]:
    filters = []
    caption = partial(describe_values, names=("caption",))
    if not s.keep_junk_captions:
        filters += [Filter(name, partial(_on_captions, rule), caption) for name, rule in JUNK.items()]
    if s.min_caption_chars is not None or s.min_caption_words is not None:
        drops = partial(caption_too_short, words=s.min_caption_words or 0, chars=s.min_caption_chars or 0)
        filters.append(Filter("caption_too_short", drops, caption))
    if s.language:
        wanted = frozenset(language_code(code) for code in s.language)
        if "language" in columns:
            by_column = partial(other_language_listed, wanted=wanted)
            filters.append(Filter("other_language", by_column, partial(describe_values, names=("language",))))
        else:
            detect = detector()
            filters.append(
                Filter(
                    "other_language",
                    partial(other_language_detected, wanted=wanted, detect=detect),
                    lambda batch: detect(_texts(batch, "caption")),
                )
            )
    return filters


def bad_url(batch: pa.RecordBatch) -> np.ndarray:
    """URLs that are not http(s)://SERVER..., or have white space in the server's name. Blanks after it are common, and
    the download encodes them as browsers do; no URL has a line break or a tab."""
    return ~as_bools(pc.match_substring_regex(batch["url"], _HOST + r"(?:[/?#\\:][\S ]*)?$"))


def caption_too_long(batch: pa.RecordBatch, most: int) -> np.ndarray:
    return as_bools(pc.greater(pc.utf8_length(batch["caption"]), most))


def caption_too_short(batch: pa.RecordBatch, words: int, chars: int) -> np.ndarray:
    """Fewer words than `words` (a Chinese or Thai character is a word) or fewer characters than `chars`."""
    captions = batch["caption"]
    short = as_bools(pc.less(pc.utf8_length(captions), chars))
    if words > 1:
        # Most captions have enough words separated by blanks, and counting is ten times slower than matching.
        enough = pc.match_substring_regex(captions, rf"\S(?:\S*\s+\S){{{words - 1}}}")
        few = np.flatnonzero(~as_bools(enough))
        counts = pc.count_substring_regex(captions.take(pa.array(few)), _WORD)
        short[few] |= as_bools(pc.less(counts, words))
    return short


def below(batch: pa.RecordBatch, name: str, threshold: float) -> np.ndarray:
    return ~(_numbers(batch, name) >= threshold)  # not (a >= b), so that NaN, a missing number, is dropped


def above(batch: pa.RecordBatch, name: str, threshold: float) -> np.ndarray:
    return ~(_numbers(batch, name) <= threshold)


def too_small(batch: pa.RecordBatch, least: int) -> np.ndarray:
    return ~(np.minimum(_numbers(batch, "width"), _numbers(batch, "height")) >= least)


def extreme_aspect(batch: pa.RecordBatch, most: float) -> np.ndarray:
    """The longer side is more than `most` times the shorter."""
    width, height = _numbers(batch, "width"), _numbers(batch, "height")
    return ~(np.maximum(width, height) <= most * np.minimum(width, height))


def blocked_domain(batch: pa.RecordBatch, domains: frozenset[str]) -> np.ndarray:
    """The server is one of `domains` (lower case) or a subdomain: "b.c" blocks b.c and a.b.c, but not ab.c."""
    hosts = hosts_of(batch["url"]).dictionary_encode()
    names = frozenset(map(_as_asked, domains))
    blocked = np.array([is_below(_as_asked(host or ""), names) for host in hosts.dictionary.to_pylist()] + [False])
    return blocked[pc.fill_null(hosts.indices, len(blocked) - 1).to_numpy(zero_copy_only=False)]


def is_below(host: str, domains: frozenset[str]) -> bool:
    parts = host.split(".")
    return any(".".join(parts[i:]) in domains for i in range(len(parts)))


def _as_asked(host: str) -> str:
    """The name by which the download asks for a server: bücher.example and b%C3%BCcher.example are one."""
    try:
        return host if host.isascii() and "%" not in host else ascii_host(host)
    except ValueError:  # it will not be asked for
        return host


def hosts_of(urls: pa.Array) -> pa.Array:
    """The servers of http(s) URLs in lower case, without port; null for any other text."""
    match = pc.extract_regex(urls, _HOST)
    return pc.utf8_rtrim(pc.utf8_lower(pc.struct_field(match, "host")), ".")


def other_language_listed(batch: pa.RecordBatch, wanted: frozenset[str]) -> np.ndarray:
    """The list's column has another language, or none."""
    codes = batch["language"].dictionary_encode()
    other = np.array([language_code(code or "") not in wanted for code in codes.dictionary.to_pylist()] + [True])
    return other[pc.fill_null(codes.indices, len(other) - 1).to_numpy(zero_copy_only=False)]


def other_language_detected(
    batch: pa.RecordBatch, wanted: frozenset[str], detect: Callable[[Iterable[str]], list[str]]
) -> np.ndarray:
    """The caption is in another language. A caption whose language is uncertain (a name, two words) passes."""
    return np.array([code not in wanted and code != UNKNOWN for code in detect(_texts(batch, "caption"))], bool)


def describe_values(batch: pa.RecordBatch, names: Sequence[str]) -> list[str]:
    """The values of the columns, shortened, for a drop's detail: "512 x 90"."""
    return [" x ".join(values) for values in zip(*(_describe(batch[name]) for name in names), strict=True)]


def caption_length(batch: pa.RecordBatch) -> list[str]:
    return [f"{length} characters" for length in pc.utf8_length(batch["caption"]).to_pylist()]


def describe_hosts(batch: pa.RecordBatch) -> list[str]:
    return [(host or "")[:_DETAIL] for host in hosts_of(batch["url"]).to_pylist()]


def _on_captions(rule: Callable[[pa.Array], np.ndarray], batch: pa.RecordBatch) -> np.ndarray:
    return rule(batch["caption"])


def _describe(column: pa.Array) -> list[str]:
    values = column.to_pylist()
    if pa.types.is_string(column.type):
        return ["null" if value is None else value[:_DETAIL] for value in values]
    return ["null" if value is None else f"{value:.6g}" for value in values]


def _texts(batch: pa.RecordBatch, name: str) -> list[str]:
    return [text or "" for text in batch[name].to_pylist()]


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """float64 [rows], NaN for null."""
    return pc.fill_null(batch[name].cast(pa.float64(), safe=False), float("nan")).to_numpy(zero_copy_only=False)
