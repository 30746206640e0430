"""Which rank the others wait for, by what each says of itself."""

from __future__ import annotations

import os

import pytest

from pretrain.parallel.board import Sign, Verdict, silent_rank, slow_rank, started
from pretrain.parallel.faults import SILENT_ELSEWHERE_S, SILENT_S, Watch
from pretrain.parallel.patience import KNOWN, OTHER_S, PATIENCE_S, RECENT, STEP_S, Patience


def signs(*ranks: tuple[int, float, dict[str, int]]) -> list[Sign | None]:
    """Of (part, seconds left, collectives)."""
    return [
        Sign(1, part, f"step {part}", left, 15.0, f"node{number}", (1, 1), calls)
        for number, (part, left, calls) in enumerate(ranks)
    ]


LATE, SOON = -1.0, 5.0


@pytest.mark.parametrize(
    ("said", "rank", "says"),
    [
        ([(7, LATE, {}), (6, LATE, {}), (7, LATE, {})], 1, "is still in step 6, and others wait for it"),
        ([(7, LATE, {}), (6, SOON, {}), (7, LATE, {})], None, ""),  # it reads, or saves: it has its time
        ([(7, LATE, {"0": 9}), (7, LATE, {"0": 8})], 1, "hangs in step 7: it did not come to the collective"),
        ([(7, LATE, {"0": 9}), (7, SOON, {"0": 8})], None, ""),
        ([(7, LATE, {"0": 9}), (7, LATE, {"0": 9})], -1, "all ranks wait in step 7, and none is behind the others"),
        # Rank 0 waits for 1 in one group, rank 2 for 0 in another: 0 is behind there, but only because it waits.
        ([(7, LATE, {"a": 4, "b": 2}), (7, LATE, {"a": 3}), (7, LATE, {"b": 3})], 1, "hangs in step 7"),
        # Groups that count differently on all of their members, such as those of pipe stages.
        ([(7, LATE, {"a": 4}), (7, LATE, {"b": 90})], -1, "all ranks wait"),
    ],
)
def test_the_rank_that_hangs_is_told_from_those_that_wait_for_it(said, rank, says):
    verdict = slow_rank(signs(*said))
    if rank is None:
        assert verdict is None
    else:
        assert verdict is not None and verdict.rank == rank and verdict.says.startswith(says)
        assert rank < 0 or str(verdict).startswith(f"rank {rank} on node{rank} ")


def test_nobody_is_accused_while_a_rank_has_not_come():
    assert slow_rank([*signs((7, LATE, {})), None]) is None
    assert silent_rank([None, *signs((7, LATE, {}))], [100.0, 3.0]) is None


def test_the_rank_that_is_silent_for_the_longest_time_is_named():
    both = signs((7, 1, {}), (7, 1, {}))
    assert silent_rank(both, [15.0, 3.0]) is None
    says = "gives no sign of life for 18 s, the last in step 7"
    assert silent_rank(both, [16.0, 18.0]) == Verdict(1, "node1", says)
    saves = both[1]._replace(silent_s=60.0)  # it writes large files
    assert silent_rank([both[0], saves], [3.0, 18.0]) is None


def test_a_limit_is_learned_from_the_parts_of_its_kind():
    patience = Patience()
    patience.note("step 1", True, 300.0)  # it compiles
    for step in range(2, 2 + KNOWN - 1):
        patience.note(f"step {step}", False, 10.0)
    assert patience.limit_s("step 9", False) == PATIENCE_S, "too little is known"
    patience.note("step 9", False, 12.0)
    assert patience.limit_s("step 10", False) == 36.0
    assert patience.limit_s("step 11", True) == patience.limit_s("the reading of step 10", False) == PATIENCE_S
    for step in range(RECENT):
        patience.note(f"step {step}", False, 0.1)
    assert patience.limit_s("step 100", False) == STEP_S
    for step in range(KNOWN):
        patience.note(f"the save of step {step}", True, 1.0)
    assert patience.limit_s("the save of step 7", True) == OTHER_S


class Posted(list):
    """A board that posts at once, and in no other moment: as if all parts were shorter than a beat."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def post_now(self) -> None:
        self.append(self.watch._sign())


def test_the_patience_with_a_first_step_ends_with_it_though_no_beat_falls_between():
    watch = Watch()
    watch.timeout_s = 600.0
    watch._board = posted = Posted(watch)  # type: ignore[assignment]
    watch.enter("step 1", patient=True)
    for step in range(2, 9):
        watch.enter(f"the reading of step {step}")
        watch.enter(f"step {step}")
    watch.enter("the save of step 8", patient=True)
    watch.enter("step 9")
    said = [(doing, silent_s) for _, doing, _, silent_s in posted]
    assert said == [
        ("step 1", SILENT_ELSEWHERE_S),
        ("the reading of step 2", SILENT_S),
        ("the save of step 8", SILENT_ELSEWHERE_S),
        ("step 9", SILENT_S),
    ]


def test_a_process_is_known_by_its_start():
    assert started(os.getpid()) == started(os.getpid()) > 0 == started(2**30)
