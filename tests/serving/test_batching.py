"""Jobs that wait together go together, in their order, and none spoils another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from pretrain.serving.batching import Batcher
from pretrain.serving.limits import Deadline, Limits, Refused


class Held:
    """A pass that waits until it may go, and notes what it got."""

    def __init__(self) -> None:
        self.go, self.begun, self.got = threading.Event(), threading.Event(), list[list]()

    def __call__(self, items: list) -> Sequence:
        self.got.append(items)
        self.begun.set()
        assert self.go.wait(30)
        if "bad" in items:
            raise ValueError("bad")
        return [item * 2 for item in items]


async def behind_the_first(held: Held, batcher: Batcher, jobs: list[tuple[str, list, Deadline]]) -> list:
    """The first job keeps the model busy while the others come, in this order."""
    first = asyncio.create_task(batcher("a", [0], Deadline(30)))
    while not held.begun.is_set():
        await asyncio.sleep(0.002)
    tasks = []
    for job in jobs:
        tasks.append(asyncio.create_task(batcher(*job)))
        await asyncio.sleep(0)
    held.go.set()
    return await asyncio.gather(first, *tasks, return_exceptions=True)


def answers(jobs: list[tuple[str, list, Deadline]], most: int = 5) -> tuple[list, list[list]]:
    held, seen = Held(), []
    batcher = Batcher({"a": held, "b": held}, most, lambda kind, items: seen.append((kind, items)))
    try:
        made = asyncio.run(behind_the_first(held, batcher, jobs))
    finally:
        batcher.close()
    assert not batcher.alive and sum(items for _, items in seen) == sum(len(m) for m in made if isinstance(m, list))
    return made[1:], held.got[1:]


def test_jobs_of_a_kind_go_together_as_far_as_they_fit_and_the_oldest_is_first():
    late = Deadline(30)
    jobs = [("a", [1, 2], late), ("b", [3], late), ("a", [4, 5], late), ("a", [6, 7], late), ("b", [8], late)]
    made, got = answers(jobs)
    assert got == [[1, 2, 4, 5], [3, 8], [6, 7]]
    assert made == [[2, 4], [6], [8, 10], [12, 14], [16]]


def test_a_job_larger_than_a_pass_goes_alone():
    made, got = answers([("a", list(range(7)), Deadline(30)), ("a", [9], Deadline(30))])
    assert got == [list(range(7)), [9]] and made == [[0, 2, 4, 6, 8, 10, 12], [18]]


def test_a_job_that_fails_fails_alone():
    made, _ = answers([("a", [1], Deadline(30)), ("a", ["bad"], Deadline(30)), ("a", [3], Deadline(30))])
    assert made[0] == [2] and made[2] == [6] and isinstance(made[1], ValueError)


def test_what_is_too_late_or_has_no_client_is_left_out():
    gone = Deadline(30)
    gone.now()
    made, got = answers([("a", [1], Deadline(0)), ("a", [2], gone), ("a", [3], Deadline(30))])
    assert got == [[3]] and made[2] == [6]
    assert [error.status for error in made[:2]] == [504, 504]


def test_a_pass_that_loses_items_is_an_error():
    batcher = Batcher({"a": lambda items: items[1:]}, 4)
    with pytest.raises(RuntimeError, match="a: 1 results of 2 items"):
        asyncio.run(batcher("a", [1, 2], Deadline(30)))
    batcher.close()
    with pytest.raises(Refused, match="shutting down"):
        asyncio.run(batcher("a", [1], Deadline(30)))


def test_limits_that_exclude_each_other_are_refused():
    with pytest.raises(ValueError, match="--queue 16 is below --pictures 32 or --texts 256"):
        Limits(queue=16)
    with pytest.raises(ValueError, match=r"--body-seconds 0 must be above 0; the default is 10\.0"):
        Limits(body_seconds=0)
