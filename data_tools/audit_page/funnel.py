"""The bars from a list to today's shards, for templates/steps.html."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from data_tools.shards.steps import Step

COLOURS = (1, 3, 4, 2, 5)  # of the reasons; 0 is the colour of kept samples
REASONS_SHOWN = 8
NARROWEST = 0.4  # percent of the widest bar, so that every part is visible
# Steps that change no shard. Further ones with the same name, from several directories, are called NAME-2, ...
NAMING = ("filter_shards", "dedup", "leaks")


class Part(NamedTuple):
    """Some samples of a step with the same outcome; edge and width in percent of the step's bar."""

    reason: str
    samples: int
    colour: int
    x: float
    width: float


class Bar(NamedTuple):
    """One step. `marks_only`: it only names the samples to drop. `width` and `flow`: its input samples and the samples
    after it, in percent of the widest bar."""

    name: str
    step: Step
    marks_only: bool
    width: float
    flow: float
    parts: list[Part]


def funnel(steps: dict[str, Step], samples: int, marks: Collection[str] = ()) -> list[Bar]:
    """`marks`: further steps that only name the samples to drop."""
    top = most(steps, samples)
    flow, bars = 0, []
    for name, step in steps.items():
        marks_only = bool(step.dropped) and (name in marks or name.partition("-")[0] in NAMING)
        # A step on one of several directories does not change the samples of the others.
        flow = max(flow, step.rows) - (0 if marks_only else step.rows - step.kept)
        width = 100 * step.rows / top
        bars.append(Bar(name, step, marks_only, round(width, 3), round(100 * flow / top, 3), _parts(step, width)))
    return bars


def most(steps: dict[str, Step], samples: int) -> int:
    """The number of samples of the widest bar."""
    return max([*(step.rows for step in steps.values()), samples, 1])


def _parts(step: Step, bar: float) -> list[Part]:
    """The kept samples, then the reasons, the most frequent first."""
    reasons = sorted(step.dropped.items(), key=lambda item: (-item[1], item[0]))
    if len(reasons) > REASONS_SHOWN:
        rest = sum(count for _, count in reasons[REASONS_SHOWN - 1 :])
        reasons = [*reasons[: REASONS_SHOWN - 1], (f"{len(reasons) - REASONS_SHOWN + 1} more reasons", rest)]
    counts = [("kept", step.kept, 0), *((r, n, COLOURS[i % len(COLOURS)]) for i, (r, n) in enumerate(reasons))]
    widths = [max(bar * n / step.rows, NARROWEST) if n else 0.0 for _, n, _ in counts]
    scale, x, parts = 100 / (sum(widths) or 1), 0.0, []
    for (reason, n, colour), width in zip(counts, widths, strict=True):
        parts.append(Part(reason, n, colour, round(scale * x, 3), round(scale * width, 3)))
        x += width
    return parts
