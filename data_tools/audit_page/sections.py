"""The sections of the audit page about steps, pictures, captions and downloads that failed: what their templates show.
None where there is nothing to show. Captions, words, servers and reasons are strangers' text; templates escape it."""

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
# Words of English that say nothing of a picture.
_LITTLE = {"a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "have", "in", "is", "it", "its", "of"}
_LITTLE |= {"on", "or", "s", "that", "the", "this", "to", "was", "were", "with", "you", "your"}
_NAMES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek"},
    **{"en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French"},
    **{"he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian"},
    **{"ja": "Japanese", "ko": "Korean", "la": "Latin", "nl": "Dutch", "no": "Norwegian", "pl": "Polish"},
    **{"pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sv": "Swedish", "th": "Thai"},
    **{"tr": "Turkish", "uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese", UNKNOWN: "cannot be told"},
}

# A section, by the names that its template reads; all have "title" and "about".
Section = dict[str, Any]
# The cells of a table's row, and its bar in percent.
Row = tuple[tuple[str, ...], float]


def way(facts: Facts) -> Section | None:
    # The download's own look at its list tells nothing where the list was clean.
    steps = {name: step for name, step in facts.steps.items() if name != "list" or step.dropped}
    if not any(name.startswith("download") for name in steps) and facts.rows and facts.failures:
        came = facts.rows - facts.failures.total()
        first = min((step.time for step in steps.values()), default=datetime.now().timestamp())
        steps = {"download": Step("download", facts.rows, came, dict(facts.failures), unit="rows", time=first), **steps}
    if not steps:
        return None
    return {
        "title": "From the list to the shards",
        "about": "each bar is what a step was given; striped: only named, data_tools.rewrite leaves it out",
        "bars": funnel(steps, facts.samples, set(facts.dropped)),
        "most": most(steps, facts.samples),
        "day": lambda step: f"{datetime.fromtimestamp(step.time):%d %b %Y, %H:%M}",
    }


def pictures(facts: Facts) -> Section | None:
    if not facts.pictures:
        return None
    aspects = facts.aspects
    formats = ", ".join(f"{percent(n, facts.pictures)} {name}" for name, n in facts.formats.most_common())
    upright = int(aspects.counts[:7].sum())  # below 0.9
    lying = int(aspects.counts[8:].sum())
    return {
        "title": "Pictures",
        "about": formats + (f"; {facts.unreadable:,} have no readable header" if facts.unreadable else ""),
        "sides": _bars("Shorter side, pixels", facts.sides, (0, 64, 128, 224, 320, 512, 1024, 4096), "pixels"),
        "aspects": _bars("Width / height", aspects, (0.4, 0.6, 0.9, 1.25, 2, 3)),
        "upright": percent(upright, aspects.total),
        "lying": percent(lying, aspects.total),
        "square": percent(aspects.total - upright - lying, aspects.total),
        "kib": _bars("Size of the file, KiB", facts.kib, (1, 4, 16, 64, 256, 1024, 4096), "KiB"),
    }


def _bars(title: str, counted: Histogram, labels: tuple[float, ...], unit: str = "") -> Bars | None:
    return histogram(title, counted.edges, counted.counts.tolist(), labels, unit)


def captions(facts: Facts) -> Section | None:
    if not facts.words.total:
        return None
    words = [(word, n) for word, n in facts.vocabulary.most(WORDS_SHOWN + len(_LITTLE)) if word not in _LITTLE]
    top = max((n for _, n in words), default=1)
    again = percent(facts.equal_captions.again(), facts.words.total)
    repeated = [(text, n) for text, n in facts.captions.most(ROWS) if n > 1]
    of = f"of {facts.languages.total():,} captions" if facts.languages is not None else ""
    return {
        "title": "Captions",
        "about": f"{facts.words.total:,} captions; {again} stand under an earlier picture too",
        "chart": _bars("Words of a caption", facts.words, (0, 5, 10, 15, 20, 25, 30, 60, 1000), "words"),
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
    """Rows of the list that gave no picture, by reason and by server."""
    if not facts.rows or not facts.failures:
        return None
    total = facts.failures.total()
    reasons = sorted(facts.failures.items(), key=lambda item: (-item[1], item[0]))[:ROWS]
    by_reason: list[Row] = [
        (("anything else" if reason == OTHER else reason, f"{n:,}", percent(n, total)), 100 * n / reasons[0][1])
        for reason, n in reasons
    ]
    came = dict(facts.served.most(len(facts.served)))
    by_server: list[Row] = []
    for server, n in facts.failed.most(ROWS):
        asked = n + came.get(server, 0)
        by_server.append(((server or "(no URL)", f"{n:,}", f"{asked:,}", percent(n, asked)), 100 * n / asked))
    return {
        "title": "Downloads that failed",
        "about": f"{total:,} of {facts.rows:,} rows gave no picture, {percent(total, facts.rows)}",
        "by_reason": by_reason,
        "by_server": by_server,
    }
