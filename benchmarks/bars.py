"""A plot for a benchmark's figures: horizontal bars as an SVG, for a README or a browser."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from html import escape
from pathlib import Path

from pretrain.files import write_file

WIDTH, LABELS, ROW, TOP, PAD = 860, 330, 28, 48, 14
NOTE_LETTERS = 130  # in a line
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")


def bars_svg(title: str, bars: Mapping[str, float | None], *, mark: float | None = None, note: str = "") -> str:
    """One bar for each name; None is a cell without a figure. `mark`: a line at this value; `note`: the command. Names
    that begin with the same word have one colour."""
    top = max([value for value in bars.values() if value is not None] + [mark or 0], default=0) or 1
    unit = (WIDTH - LABELS - 80) / top
    notes = textwrap.wrap(note, NOTE_LETTERS)
    height = TOP + ROW * len(bars) + 16 + 15 * len(notes)
    firsts = list(dict.fromkeys(name.split()[0] for name in bars))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{PAD}" y="26" font-size="16" font-weight="bold">{escape(title)}</text>',
    ]
    for place, (name, value) in enumerate(bars.items()):
        y, colour = TOP + ROW * place, COLOURS[firsts.index(name.split()[0]) % len(COLOURS)]
        parts.append(f'<text x="{LABELS - 10}" y="{y + 17}" text-anchor="end">{escape(name)}</text>')
        if value is None:
            parts.append(f'<text x="{LABELS}" y="{y + 17}" fill="#888">no figure</text>')
            continue
        length = max(unit * value, 1)
        parts.append(f'<rect x="{LABELS}" y="{y + 3}" width="{length:.1f}" height="{ROW - 8}" fill="{colour}"/>')
        parts.append(f'<text x="{LABELS + length + 6:.1f}" y="{y + 17}">{value:.4g}</text>')
    if mark is not None:
        x, end = LABELS + unit * mark, TOP + ROW * len(bars)
        parts.append(f'<path d="M{x:.1f} {TOP - 4}V{end}" stroke="#444" stroke-dasharray="4 3"/>')
    for place, line in enumerate(notes):
        y = TOP + ROW * len(bars) + 20 + 15 * place
        parts.append(f'<text x="{PAD}" y="{y}" font-size="11" fill="#666">{escape(line)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def write_bars(path: Path, title: str, bars: Mapping[str, float | None], *, mark: float | None, note: str) -> None:
    write_file(path, bars_svg(title, bars, mark=mark, note=note).encode())
