"""The contents of the audit page's sections about steps, pictures, captions and failed downloads, for their templates.
None if there is nothing to show. Captions, words, servers and reasons are untrusted text; the templates escape it."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from data_tools.audit_page.facts import LANGUAGE_SAMPLES, Facts
from data_tools.audit_page.funnel import funnel, most
from data_tools.audit_page.sketches import Histogram
from data_tools.fetch.reasons import OTHER
from data_tools.lists.languages import HOW_TO_INSTALL, UNKNOWN
from data_tools.shards.steps import Step
from pretrain.report.charts import Bars, histogram, percent

ROWS = 12  # of a table
WORDS_SHOWN = 60
# English words that say nothing about a picture.
_FUNCTION_WORDS = {
    "a",
    "an",
    "and",
    "are",
    "as",
    "at",
    "be",
    "by",
    "for",
    "from",
    "has",
    "have",
    "in",
    "is",
    "it",
    "its",
    "of",
}
_FUNCTION_WORDS |= {"on", "or", "s", "that", "the", "this", "to", "was", "were", "with", "you", "your"}
_NAMES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek"},
    **{"en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French"},
    **{"he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian"},
    **{"ja": "Japanese", "ko": "Korean", "la": "Latin", "nl": "Dutch", "no": "Norwegian", "pl": "Polish"},
    **{"pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sv": "Swedish", "th": "Thai"},
    **{"tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese", UNKNOWN: "unknown"},
}

# The values of a section, by the names in its template; all have "title" and "about".
Section = dict[str, Any]
# A table's row: its cells, and its bar in percent.
Row = tuple[tuple[str, ...], float]


def steps(facts: Facts) -> Section | None:
    # The download's record of the list is of no interest if it dropped nothing.
    records = {name: step for name, step in facts.steps.items() if name != "list" or step.dropped}
    if not any(name.startswith("download") for name in records) and facts.rows and facts.failures:
        downloaded = facts.rows - facts.failures.total()
        first = min((step.time for step in records.values()), default=datetime.now().timestamp())
        download = Step("download", facts.rows, downloaded, dict(facts.failures), unit="rows", time=first)
        records = {"download": download, **records}
    if not records:
        return None
    return {
        "title": "From the list to the shards",
        "about": "each bar is the input of a step; striped: only named, data_tools.rewrite drops them",
        "bars": funnel(records, facts.samples, set(facts.dropped)),
        "most": most(records, facts.samples),
        "day": lambda step: f"{datetime.fromtimestamp(step.time):%d %b %Y, %H:%M}",
    }


def pictures(facts: Facts) -> Section | None:
    if not facts.pictures:
        return None
    aspects = facts.aspects
    formats = ", ".join(f"{percent(n, facts.pictures)} {name}" for name, n in facts.formats.most_common())
    portrait = int(aspects.counts[:7].sum())  # width / height below 0.9
    landscape = int(aspects.counts[8:].sum())
    return {
        "title": "Pictures",
        "about": formats + (f"; {facts.unreadable:,} have no readable header" if facts.unreadable else ""),
        "sides": _bars("Shorter side, pixels", facts.sides, (0, 64, 128, 224, 320, 512, 1024, 4096), "pixels"),
        "aspects": _bars("Width / height", aspects, (0.4, 0.6, 0.9, 1.25, 2, 3)),
        "portrait": percent(portrait, aspects.total),
        "landscape": percent(landscape, aspects.total),
        "square": percent(aspects.total - portrait - landscape, aspects.total),
        "kib": _bars("File size, KiB", facts.kib, (1, 4, 16, 64, 256, 1024, 4096), "KiB"),
    }


def _bars(title: str, counts: Histogram, labels: tuple[float, ...], unit: str = "") -> Bars | None:
    return histogram(title, counts.edges, counts.counts.tolist(), labels, unit)


def captions(facts: Facts) -> Section | None:
    if not facts.words.total:
        return None
    words = [
        (word, n)
        for word, n in facts.vocabulary.most(WORDS_SHOWN + len(_FUNCTION_WORDS))
        if word not in _FUNCTION_WORDS
    ]
    top = max((n for _, n in words), default=1)
    repeats = percent(facts.equal_captions.count(), facts.words.total)
    repeated = [(text, n) for text, n in facts.captions.most(ROWS) if n > 1]
    of = f"of {facts.languages.total():,} captions" if facts.languages is not None else ""
    return {
        "title": "Captions",
        "about": f"{facts.words.total:,} captions; {repeats} repeat an earlier one",
        "chart": _bars("Words per caption", facts.words, (0, 5, 10, 15, 20, 25, 30, 60, 1000), "words"),
        "words": [(word, n, 100 * n / top) for word, n in words[:WORDS_SHOWN]],
        "repeated": [((text or "(blank)", f"{n:,}"), 100 * n / repeated[0][1]) for text, n in repeated],
        "languages": _languages(facts),
        "drawn": of + (" drawn at random" if facts.languages and facts.languages.total() == LANGUAGE_SAMPLES else ""),
        "how_to_install": HOW_TO_INSTALL,
    }


def _languages(facts: Facts) -> list[Row] | None:
    if facts.languages is None:
        return None
    total = facts.languages.total()
    counts = sorted(facts.languages.items(), key=lambda item: (-item[1], item[0]))
    if len(counts) > ROWS:
        rest = sum(n for _, n in counts[ROWS - 1 :])
        counts = [*counts[: ROWS - 1], (f"{len(counts) - ROWS + 1} others", rest)]
    return [((_NAMES.get(code, code), f"{n:,}", percent(n, total)), 100 * n / total) for code, n in counts]


def failures(facts: Facts) -> Section | None:
    """The rows of the list that failed to download, by reason and by server."""
    if not facts.rows or not facts.failures:
        return None
    total = facts.failures.total()
    reasons = sorted(facts.failures.items(), key=lambda item: (-item[1], item[0]))[:ROWS]
    by_reason: list[Row] = [
        (("anything else" if reason == OTHER else reason, f"{n:,}", percent(n, total)), 100 * n / reasons[0][1])
        for reason, n in reasons
    ]
    successes = dict(facts.server_successes.most(len(facts.server_successes)))
    by_server: list[Row] = []
    for server, n in facts.server_failures.most(ROWS):
        requests = n + successes.get(server, 0)
        by_server.append(((server or "(no URL)", f"{n:,}", f"{requests:,}", percent(n, requests)), 100 * n / requests))
    return {
        "title": "Failed downloads",
        "about": f"{total:,} of {facts.rows:,} rows failed to download, {percent(total, facts.rows)}",
        "by_reason": by_reason,
        "by_server": by_server,
    }
