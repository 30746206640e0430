"""Lays out the charts of all pages, curves and histograms, for the SVG of templates/parts.html. Bars and lines stretch
with the page while labels keep their size, so there are two units: paths are in thousandths of the chart, and all else
in percent of it."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pretrain.visible import visible

POINTS_AT_MOST = 400  # of a curve that is drawn
SMOOTH_FROM = 40  # curves with fewer points are shown as they are

Point = tuple[float, float | None]  # (step, value); None is a gap


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `colour` is 0 to 5, so that a name can keep its colour from chart to chart; `noise`: where a
    running mean is drawn, the values behind it are shown too."""

    name: str
    points: list[Point]
    colour: int = 0
    noise: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the steps. `unit` follows the numbers; `from_zero` starts the axis of values at zero; `smooth` draws
    a running mean; the legend gives each curve's last value, or with `peak` its highest."""

    title: str
    curves: list[Curve]
    unit: str = ""
    from_zero: bool = False
    smooth: bool = False
    peak: bool = False


@dataclass(frozen=True)
class Drawing:
    """A chart as it is drawn. `summary` is for screen readers, `data` the JSON that the page's script reads; labels are
    (place, text), and `legend` is (colour, name, value)."""

    title: str
    summary: str
    data: str
    paths: list[tuple[str, str]]  # (class, path); the last lies on top
    x_labels: list[tuple[float, str]]
    y_labels: list[tuple[float, str]]
    legend: list[tuple[int, str, str]]


@dataclass(frozen=True)
class Bars:
    """A histogram as it is drawn, in percent of its width and height. `bars`: (left edge, width, height, description);
    `labels`: (place, text)."""

    title: str
    bars: list[tuple[float, float, float, str]]
    labels: list[tuple[float, str]]


def smoothed(points: list[Point]) -> list[Point]:
    """The mean over a window around each point, about a thirtieth of the curve wide, so that the line does not lag
    behind. The window narrows at the start, where curves are steep, and is cut off at the end."""
    sums, counts = [0.0], [0]
    for _, value in points:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    half = max(len(points) // 60, 1)
    out: list[Point] = []
    for i, (step, value) in enumerate(points):
        reach = min(half, i)
        low, high = i - reach, min(i + reach + 1, len(points))
        out.append((step, None if value is None else (sums[high] - sums[low]) / (counts[high] - counts[low])))
    return out


def downsampled(points: list[Point], limit: int = POINTS_AT_MOST) -> list[Point]:
    """At most `limit` points: the lowest and the highest of each bucket, so that no spike is lost, and both ends."""
    if len(points) <= limit:
        return points
    first, last, inner = points[0], points[-1], points[1:-1]
    buckets = (limit - 2) // 2
    chosen = [first]
    for i in range(buckets):
        bucket = inner[i * len(inner) // buckets : (i + 1) * len(inner) // buckets]
        known = [p for p in bucket if p[1] is not None]
        if not known:
            chosen.append(bucket[0])  # a gap stays a gap
            continue
        ends = {min(known, key=lambda p: p[1] or 0.0), max(known, key=lambda p: p[1] or 0.0)}
        chosen += sorted(ends, key=lambda p: p[0])
    return [*chosen, last]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high`."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A short label: 0.25, 12.5k, 7.5e-4."""
    if value == 0:
        return "0"
    if abs(value) < 0.01:
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(unit, 1e4):
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def percent(part: float, whole: float) -> str:
    """The part's share of the whole: "12.3 %"; "< 0.1 %" for a share that would look like none."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "< 0.1 %"
    return f"{share:.1f} %"


def edge(value: float) -> str:
    """The label of a bar's edge."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def histogram(
    title: str, edges: Sequence[float], counts: Sequence[int], labels: Collection[float], unit: str = ""
) -> Bars | None:
    """Bars of equal width, from one before the first that is filled to one after the last. `counts[i]` values lie
    between `edges[i]` and `edges[i + 1]`; `labels`: the edges that get a label. None where nothing is counted."""
    filled = [i for i, count in enumerate(counts) if count]
    if not filled:
        return None
    low, high = max(filled[0] - 1, 0), min(filled[-1] + 2, len(counts))
    top, total, width = max(counts), sum(counts), 100 / (high - low)
    bars = []
    for i in range(low, high):
        span = f"{edge(edges[i])} to {edge(edges[i + 1])} {unit}".strip()
        label = f"{span}: {counts[i]:,} ({percent(counts[i], total)})"
        height = max(round(100 * counts[i] / top, 2), 1.0) if counts[i] else 0.0
        bars.append((round((i - low + 0.05) * width, 2), round(0.9 * width, 2), height, label))
    named = [(round((i - low) * width, 2), edge(edges[i])) for i in range(low, high + 1) if edges[i] in labels]
    return Bars(title, bars, named)


def drawing(chart: Chart) -> Drawing | None:
    """The chart laid out; None if it has no numbers."""
    curves = [curve for curve in chart.curves if any(value is not None for _, value in curve.points)]
    if not curves:
        return None
    drawn = [(curve, *_lines(curve, chart.smooth)) for curve in curves]
    values = [v for _, raw, mean in drawn for _, v in (raw or mean) if v is not None]
    steps = [step for curve in curves for step, _ in (curve.points[0], curve.points[-1])]
    y_ticks = nice_ticks(0.0 if chart.from_zero else min(values), _top(values))
    x_low = 0 if min(steps) <= 0.1 * max(steps) else min(steps)
    x_high = max(max(steps), x_low + 1)
    x_ticks = [t for t in nice_ticks(x_low, x_high) if x_low <= t <= x_high]
    frame = _Frame(x_low, x_high, y_ticks[0], y_ticks[-1])
    paths = [("grid", "".join(f"M0 {frame.y(t):.1f}H1000" for t in y_ticks))]
    for curve, raw, mean in reversed(drawn):  # the first curve lies on top
        paths += [(f"raw c{curve.colour}", frame.path(raw))] if raw else []
        paths.append((f"line c{curve.colour}", frame.path(mean)))
    data = {
        "unit": chart.unit,
        "frame": [x_low, x_high, y_ticks[0], y_ticks[-1]],
        "curves": [{"name": visible(curve.name), "points": _short(mean)} for curve, _, mean in drawn],
    }
    return Drawing(
        title=chart.title,
        summary=_summary(chart, drawn),
        data=json.dumps(data, separators=(",", ":")),
        paths=paths,
        x_labels=[(round(frame.x(t) / 10, 2), number(t)) for t in x_ticks],
        y_labels=[(round(frame.y(t) / 10, 2), number(t) + chart.unit) for t in y_ticks],
        legend=[
            (curve.colour, curve.name, number(_legend_value(mean, chart)) + chart.unit) for curve, _, mean in drawn
        ],
    )


@dataclass(frozen=True)
class _Frame:
    """Converts steps and values to the 1000 x 1000 units of the drawing, whose y grows downwards."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, step: float) -> float:
        return 1000 * (step - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return 1000 * (1 - min(max(share, 0.0), 1.0))

    def path(self, points: list[Point]) -> str:
        parts, pen_up, alone = [], True, False
        for step, value in points:
            if value is None:
                parts += ["h1"] if alone else []
                pen_up, alone = True, False
                continue
            parts.append(f"{'M' if pen_up else 'L'}{self.x(step):.1f} {self.y(value):.1f}")
            pen_up, alone = False, pen_up
        return "".join(parts) + ("h1" if alone else "")  # a lone point would be invisible


def _lines(curve: Curve, smooth: bool) -> tuple[list[Point], list[Point]]:
    """(the noisy line behind, [] where there is none; the line in front), both thinned out."""
    if not smooth or len(curve.points) < SMOOTH_FROM:
        return [], downsampled(curve.points)
    return (downsampled(curve.points) if curve.noise else []), downsampled(smoothed(curve.points))


def _top(values: list[float]) -> float:
    """The top of the axis: the highest value, unless a few spikes would flatten all the rest."""
    ordered = sorted(values)
    usual = ordered[int(0.98 * (len(ordered) - 1))]
    return usual * 1.2 if usual > 0 and ordered[-1] > 4 * usual else ordered[-1]


def _last(points: list[Point]) -> float:
    return next(value for _, value in reversed(points) if value is not None)


def _legend_value(points: list[Point], chart: Chart) -> float:
    return max(value for _, value in points if value is not None) if chart.peak else _last(points)


def _short(points: list[Point]) -> list[list[float | None]]:
    """The points with values of five digits, which keep the page small."""
    return [[step, None if value is None else float(f"{value:.5g}")] for step, value in points]


def _summary(chart: Chart, drawn: list) -> str:
    """The sentence that a screen reader reads for the chart."""
    parts = []
    for curve, _, mean in drawn:
        first = next(value for _, value in mean if value is not None)
        parts.append(f"{curve.name} from {number(first)}{chart.unit} to {number(_last(mean))}{chart.unit}")
    steps = drawn[0][0].points
    return f"{chart.title}, steps {number(steps[0][0])} to {number(steps[-1][0])}: {'; '.join(parts)}"
