"""Where a pipeline is cut: consecutive blocks are divided among stages so that the slowest stage is as fast as can
be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise


def cut(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """The costs of all blocks -> bounds [stages + 1]: stage s gets the blocks bounds[s] .. bounds[s + 1] - 1, at least
    one. The slowest stage has the smallest possible cost, and among such cuts the costs are as equal as possible."""
    assert 1 <= stages <= len(costs), (stages, len(costs))  # legal.py reports it to users
    slowest = max(stage_costs(costs, _cheapest(costs, stages, exponent=math.inf)))
    return _cheapest(costs, stages, exponent=2, limit=slowest * (1 + 1e-9))


def stage_costs(costs: Sequence[float], bounds: Sequence[int]) -> list[float]:
    """The sum of each stage's costs."""
    return [sum(costs[start:stop]) for start, stop in pairwise(bounds)]


def _cheapest(costs: Sequence[float], stages: int, *, exponent: float, limit: float = math.inf) -> tuple[int, ...]:
    """The cut with the smallest norm of the stages' costs, none of them above `limit`; by dynamic programming."""
    total = [0.0, *accumulate(costs)]
    # The best cut so far of the first `stop` blocks: (norm, bounds).
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(stages):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for start, (norm, bounds) in best.items():
            for stop in range(start + 1, len(total)):
                cost = total[stop] - total[start]
                joined = max(norm, cost) if exponent == math.inf else norm + cost**exponent
                if cost <= limit and (stop not in following or joined < following[stop][0]):
                    following[stop] = joined, (*bounds, stop)
        best = following
    return best[len(costs)][1]
