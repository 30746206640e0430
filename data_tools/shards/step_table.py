"""A step record as lines for a terminal."""

from __future__ import annotations

from data_tools.shards.steps import Step


def step_table(step: Step) -> str:
    """A line for the rows, for each reason, and for the kept rows, each with its share of the rows."""
    lines = [(step.unit, step.rows), *step.dropped.items(), ("kept", step.kept)]
    width = max(len(name) for name, _ in lines)
    shares = (f"{100 * count / step.rows:6.2f} %" if step.rows else "" for _, count in lines)
    return "\n".join(
        f"{name:<{width}}  {count:>15,}  {share}".rstrip() for (name, count), share in zip(lines, shares, strict=True)
    )
