"""A step record as lines for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from data_tools.shards.steps import Step
from pretrain.visible import visible


def step_table(step: Step) -> str:
    """A line for the rows, for each reason, and for the kept rows, each with its share of the rows."""
    dropped = ((visible(reason), count) for reason, count in step.dropped.items())
    lines = [(step.unit, step.rows), *dropped, ("kept", step.kept)]
    width = max(len(name) for name, _ in lines)
    shares = (f"{100 * count / step.rows:6.2f} %" if step.rows else "" for _, count in lines)
    return "\n".join(
        f"{name:<{width}}  {count:>15,}  {share}".rstrip() for (name, count), share in zip(lines, shares, strict=True)
    )


def describe_drops(dropped: Mapping[str, int]) -> str:
    """The reasons and their counts as a phrase, most frequent first; "none" if nothing was dropped."""
    return ", ".join(f"{reason} {count:,}" for reason, count in Counter(dropped).most_common()) or "none"
