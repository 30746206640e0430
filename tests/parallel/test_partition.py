"""Cutting blocks into pipeline stages: against trying every cut."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from pretrain.parallel.partition import cut, stage_costs


def every_cut(blocks: int, stages: int) -> list[tuple[int, ...]]:
    return [(0, *inner, blocks) for inner in combinations(range(1, blocks), stages - 1)]


def test_equal_blocks_make_equal_stages():
    assert cut([2.0] * 12, 4) == (0, 3, 6, 9, 12)
    assert stage_costs([2.0] * 12, (0, 3, 6, 9, 12)) == [6.0] * 4


def test_heavy_heads_leave_the_last_stage_fewer_blocks():
    assert cut([1.0] * 11 + [4.0], 4) == (0, 3, 7, 11, 12)
    # The last block alone is the dearest stage: the others are still as equal as they can be.
    assert cut([1.0] * 6 + [9.0], 3) == (0, 3, 6, 7)


@pytest.mark.parametrize("seed", range(20))
def test_no_cut_is_better(seed):
    made = random.Random(seed)
    costs = [made.choice((1.0, 2.0, 3.5, 7.0)) for _ in range(made.randint(3, 8))]
    stages = made.randint(1, len(costs))

    def badness(bounds: tuple[int, ...]) -> tuple[float, float]:
        each = stage_costs(costs, bounds)
        return max(each), sum(cost**2 for cost in each)

    assert badness(cut(costs, stages)) == pytest.approx(min(map(badness, every_cut(len(costs), stages))))


@pytest.mark.parametrize("stages", [0, 3])
def test_each_stage_needs_a_block(stages):
    with pytest.raises(AssertionError):
        cut([1.0, 1.0], stages)
