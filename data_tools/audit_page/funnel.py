"""The way from a list to the shards of today, as templates/steps.html draws it."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from data_tools.shards.steps import Step

COLOURS = (1, 3, 4, 2, 5)  # of the reasons; 0 is the colour of what is kept
REASONS_SHOWN = 8
NARROWEST = 0.4  # percent of the widest bar: what is there can be seen
# Steps that change no shard; what several directories had under one name is called NAME-2, ...
NAMING = ("filter_shards", "dedup", "leaks")


class Part(NamedTuple):
    """What became of some samples of a step; edge and width in percent of its bar."""

    reason: str
    samples: int
    colour: int
    x: float
    width: float


class Bar(NamedTuple):
    """`marked`: the step only names what it drops. Widths are percents: of what it was given, and of what the samples
    that it leaves are."""

    name: str
    step: Step
    marked: bool
    width: float
    flow: float
    parts: list[Part]


def funnel(steps: dict[str, Step], samples: int, marks: Collection[str] = ()) -> list[Bar]:
    """`marks`: more steps that only name what they drop."""
    top = most(steps, samples)
    flow, bars = 0, []
    for name, step in steps.items():
        marked = bool(step.dropped) and (name in marks or name.partition("-")[0] in NAMING)
        # A step of one of several directories leaves the samples of the others as they are.
        flow = max(flow, step.rows) - (0 if marked else step.rows - step.kept)
        width = 100 * step.rows / top
        bars.append(Bar(name, step, marked, round(width, 3), round(100 * flow / top, 3), _parts(step, width)))
    return bars


def most(steps: dict[str, Step], samples: int) -> int:
    """What the widest bar stands for."""
    return max([*(step.rows for step in steps.values()), samples, 1])


def _parts(step: Step, bar: float) -> list[Part]:
    """What it kept, then its reasons, the most frequent first."""
    reasons = sorted(step.dropped.items(), key=lambda item: (-item[1], item[0]))
    if len(reasons) > REASONS_SHOWN:
        rest = sum(count for _, count in reasons[REASONS_SHOWN - 1 :])
        reasons = [*reasons[: REASONS_SHOWN - 1], (f"{len(reasons) - REASONS_SHOWN + 1} more reasons", rest)]
    named = [("kept", step.kept, 0), *((r, n, COLOURS[i % len(COLOURS)]) for i, (r, n) in enumerate(reasons))]
    widths = [max(bar * n / step.rows, NARROWEST) if n else 0.0 for _, n, _ in named]
    scale, x, parts = 100 / (sum(widths) or 1), 0.0, []
    for (reason, n, colour), width in zip(named, widths, strict=True):
        parts.append(Part(reason, n, colour, round(scale * x, 3), round(scale * width, 3)))
        x += width
    return parts
