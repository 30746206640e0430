"""The picture beside the claims' table: each seed's difference as a dot, as SVG."""

from __future__ import annotations

from html import escape
from typing import Any

from benchmarks.claims.comparisons import CONTRADICTED, SHORT, SHOWN

WIDTH, MIDDLE, HALF, ROW, TOP = 1080, 790, 150, 24, 50
COLOURS = {SHOWN: "#3ca951", CONTRADICTED: "#d1493f"}
OTHERWISE = "#8a8a8a"


def picture(rows: list[dict[str, Any]]) -> str:
    """A line for each comparison of which at least one seed is done; right of the middle the claim holds. All lines
    share one scale of points."""
    lines = [each for each in rows if each["differences"]]
    widest = max((abs(value) for each in lines for value in each["differences"].values()), default=1.0) or 1.0
    height = TOP + ROW * len(lines) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{MIDDLE}" y="20" text-anchor="middle">points by which the claim holds, each seed</text>',
        f'<text x="{MIDDLE - HALF}" y="38" text-anchor="middle" fill="#555555">{-widest:.0f}</text>',
        f'<text x="{MIDDLE + HALF}" y="38" text-anchor="middle" fill="#555555">{widest:.0f}</text>',
        f'<line x1="{MIDDLE}" x2="{MIDDLE}" y1="{TOP - 10}" y2="{height - 10}" stroke="#444444"/>',
    ]
    for place, each in enumerate(lines):
        y = TOP + ROW * place + ROW / 2
        words = f"{each['claim']}: {each['says']} ({SHORT[each['score']]})"
        colour = COLOURS.get(each["verdict"], OTHERWISE)
        parts.append(f'<text x="{MIDDLE - HALF - 16}" y="{y + 4:.0f}" text-anchor="end">{escape(words)}</text>')
        parts.append(f'<text x="{MIDDLE + HALF + 14}" y="{y + 4:.0f}" fill="{colour}">{escape(each["verdict"])}</text>')
        for value in each["differences"].values():
            parts.append(f'<circle cx="{MIDDLE + HALF * value / widest:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>", ""])
