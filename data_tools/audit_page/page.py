"""The audit as one HTML page that needs no network. Captions, keys, servers and reasons are strangers' text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from data_tools.audit_page.charts import CSS, clean, funnel, percent
from data_tools.audit_page.facts import Facts
from data_tools.audit_page.samples import dropped, wall
from data_tools.audit_page.sections import captions, failures, heading, pictures
from data_tools.shards.steps import Step
from pretrain.report.style import CSS as HOUSE_CSS


def page(directories: Sequence[Path], facts: Facts, seed: int) -> str:
    """The whole page as HTML."""
    title = ", ".join(directory.resolve().name for directory in directories)
    sections = {
        "Steps": _way(facts),
        "Pictures": pictures(facts),
        "Captions": captions(facts),
        "Failures": failures(facts),
        "Samples": wall(facts, seed),
        "Dropped": dropped(facts),
    }
    shown = {name: html for name, html in sections.items() if html}
    links = "".join(f'<a href="#{name.lower()}">{name}</a>' for name in shown)
    body = "".join(f'<section class="stage" id="{name.lower()}">{html}</section>' for name, html in shown.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';style-src 'unsafe-inline';"
        'img-src data:">'
        f"<title>{clean(title)} · Imglish data</title><style>{HOUSE_CSS}{CSS}</style></head><body>"
        f'<header><p class="over">Imglish data audit</p><h1>{clean(title)}</h1>'
        f'<p class="soft">{clean(" · ".join(map(str, directories)))}</p>'
        f'<nav aria-label="Sections">{links}</nav>{_tiles(facts)}</header><main>{body}</main>'
        f'<footer class="soft">Page written {datetime.now():%d %B %Y, %H:%M}. {_approximations(facts)}</footer>'
        "</body></html>"
    )


def _tiles(facts: Facts) -> str:
    tiles = [_tile("Samples", f"{facts.samples:,}", "", f"in {facts.shards:,} shards")]
    value, unit = _bytes(facts.tar_bytes)
    tiles.append(_tile("On the disk", value, unit, f"{_each(facts.tar_bytes, facts.samples)} a sample"))
    if facts.rows and facts.failures:
        came = facts.rows - facts.failures.total()
        tiles.append(_tile("Downloaded", f"{100 * came / facts.rows:.1f}", "%", f"{came:,} of {facts.rows:,} rows"))
    if facts.words.total:
        (low, _), (middle, _), (high, _) = (facts.words.bin_of(share) for share in (0.1, 0.5, 0.9))
        between = f"8 of 10 have {low:.0f} to {high:.0f}"
        tiles.append(_tile("Words of a caption", f"{middle:.0f}", "median", between))
    if facts.equal_pictures.total:
        again = facts.equal_pictures.again()
        about = "equal an earlier picture, byte for byte"
        tiles.append(_tile("Exact copies", percent(again, facts.equal_pictures.total).removesuffix(" %"), "%", about))
    if facts.dropped_samples.total:
        marked = facts.dropped_samples.total - facts.dropped_samples.again()
        tiles.append(_tile("Named to drop", f"{marked:,}", "", f"{percent(marked, facts.samples)} of the samples"))
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _tile(name: str, value: str, unit: str, below: str) -> str:
    return (
        f'<div class="tile"><dt>{name}</dt><dd class="big">{clean(value)}<small> {unit}</small></dd>'
        f'<dd class="soft">{clean(below)}</dd></div>'
    )


def _bytes(count: float) -> tuple[str, str]:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:.3g}", unit
    return f"{count / 1024:.3g}", "KiB"


def _each(total: float, number: int) -> str:
    return " ".join(_bytes(total / number)) if number else "-"


def _way(facts: Facts) -> str:
    # The download's own look at its list tells nothing where the list was clean.
    steps = {name: step for name, step in facts.steps.items() if name != "list" or step.dropped}
    if not any(name.startswith("download") for name in steps) and facts.rows and facts.failures:
        came = facts.rows - facts.failures.total()
        first = min((step.time for step in steps.values()), default=datetime.now().timestamp())
        steps = {"download": Step("download", facts.rows, came, dict(facts.failures), unit="rows", time=first), **steps}
    if not steps:
        return ""
    about = "each bar is what a step was given; striped: only named, data_tools.rewrite leaves it out"
    return heading("From the list to the shards", about) + funnel(steps, facts.samples, set(facts.dropped))


def _approximations(facts: Facts) -> str:
    """What on the page is not exact."""
    notes = ["Half, 9 of 10 and so on are told to the width of a chart's bin."]
    for what, counter in (("words", facts.vocabulary), ("captions", facts.captions), ("servers", facts.failed)):
        if counter.error:
            notes.append(f"Counts of {what} may be too low by up to {counter.error:,}.")
    if not (facts.equal_pictures.exact and facts.equal_captions.exact):
        notes.append("Repetitions are estimated from a sample of millions of hashes.")
    if facts.partial:
        notes.append(f"{len(facts.partial):,} partial shards are left out.")
    return clean(" ".join(notes))
