"""The audit as one HTML page that needs no network. Captions, keys, servers and reasons are untrusted text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_tools.audit_page.facts import Facts
from data_tools.audit_page.samples import dropped, wall
from data_tools.audit_page.sections import captions, failures, pictures, steps
from pretrain.report.charts import percent
from pretrain.report.html import render

TEMPLATES = Path(__file__).parent / "templates"


def page(directories: Sequence[Path], facts: Facts, seed: int) -> str:
    """The whole page as HTML."""
    sections = {
        "Steps": steps(facts),
        "Pictures": pictures(facts),
        "Captions": captions(facts),
        "Failures": failures(facts),
        "Samples": wall(facts, seed),
        "Dropped": dropped(facts),
    }
    present = {name: section for name, section in sections.items() if section}
    return render(
        TEMPLATES / "audit.html",
        styles=[TEMPLATES / "audit.css"],
        kind="Imglish data audit",
        title=", ".join(directory.resolve().name for directory in directories),
        series="Imglish data",
        about=" · ".join(map(str, directories)),
        contents="Sections",
        links=[(name.lower(), name) for name in present],
        tiles=_tiles(facts),
        sections=present,
        facts=facts,
        percent=percent,
        approximations=_approximations(facts),
    )


def _tiles(facts: Facts) -> list[tuple[str, str, str, str]]:
    """(name, value, unit, note below)"""
    tiles = [("Samples", f"{facts.samples:,}", "", f"in {facts.shards:,} shards")]
    value, unit = _bytes(facts.tar_bytes)
    tiles.append(("On disk", value, unit, f"{_each(facts.tar_bytes, facts.samples)} per sample"))
    if facts.rows and facts.failures:
        downloaded = facts.rows - facts.failures.total()
        tiles.append(
            ("Downloaded", f"{100 * downloaded / facts.rows:.1f}", "%", f"{downloaded:,} of {facts.rows:,} rows")
        )
    if facts.words.total:
        (low, _), (middle, _), (high, _) = (facts.words.bin_of(share) for share in (0.1, 0.5, 0.9))
        between = f"8 of 10 have {low:.0f} to {high:.0f}"
        tiles.append(("Words per caption", f"{middle:.0f}", "median", between))
    if facts.equal_pictures.total:
        copies = facts.equal_pictures.count()
        note = "have the same bytes as an earlier picture"
        tiles.append(("Exact copies", percent(copies, facts.equal_pictures.total).removesuffix(" %"), "%", note))
    if facts.dropped_samples.total:
        to_drop = facts.dropped_samples.total - facts.dropped_samples.count()
        tiles.append(("To drop", f"{to_drop:,}", "", f"{percent(to_drop, facts.samples)} of the samples"))
    return tiles


def _bytes(count: float) -> tuple[str, str]:
    for size, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if count >= size:
            return f"{count / size:.3g}", unit
    return f"{count / 1024:.3g}", "KiB"


def _each(total: float, number: int) -> str:
    return " ".join(_bytes(total / number)) if number else "-"


def _approximations(facts: Facts) -> str:
    """Which numbers of the page are not exact."""
    notes = ["Half, 9 of 10 and so on are exact to the width of a chart's bin."]
    for what, counter in (
        ("words", facts.vocabulary),
        ("captions", facts.captions),
        ("servers", facts.server_failures),
    ):
        if counter.error:
            notes.append(f"Counts of {what} may be too low by up to {counter.error:,}.")
    if not (facts.equal_pictures.exact and facts.equal_captions.exact):
        notes.append("Repetitions are estimated from a sample of millions of hashes.")
    if facts.partial:
        notes.append(f"{len(facts.partial):,} partial shards are not included.")
    return " ".join(notes)
