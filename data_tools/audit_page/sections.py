"""The sections of the audit page about pictures, captions and downloads that failed."""

from __future__ import annotations

from data_tools.audit_page.charts import bars, clean, isolated, kinds, percent, table
from data_tools.audit_page.facts import LANGUAGE_SAMPLES, Facts
from data_tools.fetch.reasons import OTHER
from data_tools.lists.languages import HOW_TO_INSTALL, UNKNOWN

ROWS = 12  # of a table
WORDS_SHOWN = 60
# Words of English that say nothing of a picture.
_LITTLE = {"a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "have", "in", "is", "it", "its", "of"}
_LITTLE |= {"on", "or", "s", "that", "the", "this", "to", "was", "were", "with", "you", "your"}
_NAMES = {
    **{"ar": "Arabic", "bg": "Bulgarian", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek"},
    **{"en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French"},
    **{"he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian", "id": "Indonesian", "it": "Italian"},
    **{
        "ja": "Japanese",
        "ko": "Korean",
        "la": "Latin",
        "nl": "Dutch",
        "no": "Norwegian",
        "pl": "Polish",
        "pt": "Portuguese",
    },
    **{"ro": "Romanian", "ru": "Russian", "sk": "Slovak", "sv": "Swedish", "th": "Thai", "tr": "Turkish"},
    **{"uk": "Ukrainian", "vi": "Vietnamese", "zh": "Chinese", UNKNOWN: "cannot be told"},
}


def heading(title: str, about: str) -> str:
    """`about` is HTML."""
    return f'<div class="head"><h2>{title}</h2><span class="soft">{about}</span></div>'


def pictures(facts: Facts) -> str:
    if not facts.pictures:
        return ""
    sides, aspects, kib = facts.sides, facts.aspects, facts.kib
    formats = ", ".join(f"{percent(n, facts.pictures)} {clean(name)}" for name, n in facts.formats.most_common())
    about = formats + (f"; {facts.unreadable:,} have no readable header" if facts.unreadable else "")
    upright = int(aspects.counts[:7].sum())  # below 0.9
    across = int(aspects.counts[8:].sum())
    charts = bars(
        "Shorter side, pixels",
        sides,
        "pixels",
        f"Half of the pictures have <b>{sides.bin_of(0.5)[0]:,.0f}</b> or more, 9 of 10 have "
        f"<b>{sides.bin_of(0.1)[0]:,.0f}</b> or more.",
        (0, 64, 128, 224, 320, 512, 1024, 4096),
        "third",
    )
    charts += bars(
        "Width / height",
        aspects,
        "",
        f"<b>{percent(upright, aspects.total)}</b> upright, <b>{percent(across, aspects.total)}</b> lying, "
        f"<b>{percent(aspects.total - upright - across, aspects.total)}</b> about square.",
        (0.4, 0.6, 0.9, 1.25, 2, 3),
        "third",
    )
    charts += bars(
        "Size of the file, KiB",
        kib,
        "KiB",
        f"Half of the files have less than <b>{kib.bin_of(0.5)[1]:,.3g}</b> KiB, 9 of 10 less than "
        f"<b>{kib.bin_of(0.9)[1]:,.3g}</b>.",
        (1, 4, 16, 64, 256, 1024, 4096),
        "third",
    )
    return heading("Pictures", about) + f'<div class="charts">{charts}</div>'


def captions(facts: Facts) -> str:
    if not facts.words.total:
        return ""
    empty = int(facts.words.counts[0])
    chart = bars(
        "Words of a caption",
        facts.words,
        "words",
        f"Half of the captions have <b>{facts.words.bin_of(0.5)[0]:.0f}</b> words or more; {empty:,} have none.",
        (0, 5, 10, 15, 20, 25, 30, 60, 1000),
        "full",
    )
    words = [(word, n) for word, n in facts.vocabulary.most(WORDS_SHOWN + len(_LITTLE)) if word not in _LITTLE]
    again = facts.equal_captions.again()
    about = f"{facts.words.total:,} captions; {percent(again, facts.words.total)} stand under an earlier picture too"
    cards = f'<div class="card"><p class="title">Most frequent words</p>{kinds(words[:WORDS_SHOWN])}</div>'
    pair = "".join((_repeated(facts), _languages(facts)))
    return heading("Captions", about) + f'<div class="charts">{chart}</div>{cards}<div class="pair">{pair}</div>'


def _repeated(facts: Facts) -> str:
    found = [(text, n) for text, n in facts.captions.most(ROWS) if n > 1]
    if not found:
        return '<div class="card"><p class="note">No caption stands under two pictures.</p></div>'
    rows = [(isolated(text or "(blank)"), f"{n:,}") for text, n in found]
    return table("Captions that repeat", "", ("caption", "pictures"), rows, [n / found[0][1] for _, n in found])


def _languages(facts: Facts) -> str:
    if facts.languages is None:
        return (
            '<div class="card"><p class="title">Languages</p><p class="note">Not told, because py3langid is not '
            f"installed: {clean(HOW_TO_INSTALL)}.</p></div>"
        )
    total = facts.languages.total()
    counts = sorted(facts.languages.items(), key=lambda item: (-item[1], item[0]))
    if len(counts) > ROWS:
        rest = sum(n for _, n in counts[ROWS - 1 :])
        counts = [*counts[: ROWS - 1], (f"{len(counts) - ROWS + 1} others", rest)]
    rows = [(clean(_NAMES.get(code, code)), f"{n:,}", percent(n, total)) for code, n in counts]
    about = f"of {total:,} captions" + (" drawn at random" if total == LANGUAGE_SAMPLES else "")
    return table("Languages", about, ("language", "captions", "share"), rows, [n / total for _, n in counts])


def failures(facts: Facts) -> str:
    """Rows of the list that gave no picture, by reason and by server."""
    if not facts.rows or not facts.failures:
        return ""
    total = facts.failures.total()
    reasons = sorted(facts.failures.items(), key=lambda item: (-item[1], item[0]))[:ROWS]
    by_reason = table(
        "By reason",
        "",
        ("reason", "rows", "share"),
        [(clean(reason if reason != OTHER else "anything else"), f"{n:,}", percent(n, total)) for reason, n in reasons],
        [n / reasons[0][1] for _, n in reasons],
    )
    servers = facts.failed.most(ROWS)
    came = dict(facts.served.most(len(facts.served)))
    rows, shares = [], []
    for server, n in servers:
        asked = n + came.get(server, 0)
        rows.append((isolated(server or "(no URL)"), f"{n:,}", f"{asked:,}", percent(n, asked)))
        shares.append(n / asked)
    by_server = table("By server", "", ("server", "failed", "of rows", "rate"), rows, shares)
    about = f"{total:,} of {facts.rows:,} rows gave no picture, {percent(total, facts.rows)}"
    return heading("Downloads that failed", about) + f'<div class="pair">{by_reason}{by_server}</div>'
