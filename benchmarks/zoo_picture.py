"""The picture beside the zoo's table: percent over TFLOP, as SVG."""

from __future__ import annotations

import math
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT, LEFT, BOTTOM, ROOM = 720, 360, 60, 50, 20
LINE, LETTER = 14, 7  # pixels of a text's line, and about those of a letter


class Mark(NamedTuple):
    """A member as a point."""

    name: str
    tflop: float
    percent: float


def picture(marks: list[Mark]) -> str:
    """Compute on a logarithmic scale, percent from 0 to 100."""
    low = math.floor(math.log10(min(mark.tflop for mark in marks)) * 5) / 5
    high = max(math.ceil(math.log10(max(mark.tflop for mark in marks)) * 5) / 5, low + 0.4)

    def x(tflop: float) -> float:
        return LEFT + (math.log10(tflop) - low) / (high - low) * (WIDTH - LEFT - 160)

    def y(percent: float) -> float:
        return HEIGHT - BOTTOM - percent / 100 * (HEIGHT - BOTTOM - ROOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"',
        ' font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for percent in range(0, 101, 20):
        line = f'x1="{LEFT}" x2="{WIDTH - ROOM}" y1="{y(percent):.1f}" y2="{y(percent):.1f}"'
        parts.append(f'<line {line} stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(percent) + 4:.1f}" text-anchor="end" fill="#555555">{percent}</text>')
    for tflop in _ticks(low, high):
        parts.append(
            f'<text x="{x(tflop):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle" fill="#555555">{tflop:g}</text>'
        )
    middle = f'x="{(LEFT + WIDTH - 160) / 2}" y="{HEIGHT - 8}" text-anchor="middle"'
    parts.append(f"<text {middle}>TFLOP of training</text>")
    parts.append(f'<text x="{LEFT}" y="14">R@1 of 256, mean of both ways, percent</text>')
    texts = [f"{mark.name} {mark.percent:.0f}" for mark in marks]
    points = [(x(mark.tflop), y(mark.percent)) for mark in marks]
    parts += [f'<circle cx="{left:.1f}" cy="{top:.1f}" r="5" fill="#2463b0"/>' for left, top in points]
    for text, (left, top) in zip(texts, _apart(texts, points), strict=True):
        parts.append(f'<text x="{left:.1f}" y="{top:.1f}">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _apart(texts: list[str], points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Where each text stands: right of its point, or so far below that it is clear of the texts above it."""
    places: dict[int, tuple[float, float]] = {}
    for number in sorted(range(len(texts)), key=lambda number: points[number][1]):
        left, top = points[number][0] + 9, points[number][1] + 4
        for other, (start, line) in sorted(places.items(), key=lambda item: item[1][1]):
            beside = left > start + LETTER * len(texts[other]) or start > left + LETTER * len(texts[number])
            if not beside and abs(top - line) < LINE:
                top = line + LINE
        places[number] = left, top
    return [places[number] for number in range(len(texts))]


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... between the two powers of ten."""
    every = [m * 10.0**p for p in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    return [tick for tick in every if low <= math.log10(tick) <= high]
