"""A rank that makes the others wait is named, though their steps take equally long."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.lives import ThisLife, note_slow, read_lives
from pretrain.run.stragglers import Slow, slow_ranks
from tests.distributed import run_ranks


@pytest.mark.parametrize(
    ("passes", "waits", "slow"),
    [
        ([1.0, 1.1, 1.0, 1.14], [0.0, 0.2, 0.1, 0.2], []),
        ([1.0, 1.0, 1.2, 1.0], [0.0] * 4, [Slow(2, "compute", 0.2)]),
        ([1.0, 1.5], [0.0, 0.0], [Slow(1, "compute", 0.5)]),  # also of two
        ([1.0] * 4, [0.0, 0.1, 0.9, 0.0], [Slow(2, "data", 0.45)]),
        ([1.0, 1.3, 1.0, 1.0], [0.1, 0.1, 0.1, 1.1], [Slow(3, "data", 0.5), Slow(1, "compute", 0.3)]),
        ([0.01, 0.04], [0.0, 0.0], []),  # of a step of two seconds
        ([0.0] * 4, [0.1] * 4, []),  # no pass has been timed yet
    ],
)
def test_who_is_slow(passes, waits, slow):
    found = slow_ranks(passes, waits, step_s=2.0)
    assert [(each.rank, each.doing) for each in found] == [(each.rank, each.doing) for each in slow]
    assert [each.share for each in found] == pytest.approx([each.share for each in slow])


def steps_of_a_slow_rank(place: str, apart: bool) -> list[dict[str, float]]:
    """Rank 1's passes and products take three seconds until step 9, all others one, by a clock of the test. -> what
    each reading gives."""
    import torch
    from torch import nn

    from pretrain.distributed import rank
    from pretrain.run import stragglers

    stragglers.EVERY, stragglers.WARM, stragglers.PRODUCT_EVERY = 4, 1, 2
    slow, clock = [True], [100.0]
    stragglers.time = SimpleNamespace(perf_counter=lambda: clock[0])

    def work(*_):
        clock[0] += 3.0 if rank() == 1 and slow[0] else 1.0

    class Encoder(nn.Module):
        def forward(self, x):
            work()
            return x

    task = nn.Module()
    task.encoder = Encoder()
    if not apart:
        torch.mm = work
    times, lines = stragglers.RankTimes(task, Path(place), apart=apart), []
    for step in range(1, 14):
        slow[0] = step < 10
        task.encoder(torch.ones(1))
        if rank() == 0:  # a second pass in the step, perhaps of what another rank has sent, counts for nothing
            task.encoder(torch.ones(1))
        clock[0] += 5.0
        times.tick(0.0)
        if line := times.read():
            lines.append(line | {"step": step})
    return lines


def test_a_rank_whose_pass_is_slow_is_named_until_it_is_slow_no_more(tmp_path):
    life = ThisLife(tmp_path, 0, 0)
    first, second = run_ranks(steps_of_a_slow_rank, 2, str(tmp_path), True)
    assert first == second and [line["step"] for line in first] == [5, 9, 13]
    assert [line.get("slow_rank") for line in first] == [1, 1, None]
    assert [line["pass_spread"] for line in first] == [2.0, 2.0, 0.0] and first[0]["wait_spread"] == 0
    noted = (tmp_path / "lives.jsonl").read_text().splitlines()
    assert len(noted) == 3, "named once, and once that it is over"
    assert "step 5: rank 1 on " in noted[1] and "computes 200% longer than the median rank" in noted[1]
    assert read_lives(tmp_path)[0].slow == ""
    note_slow(tmp_path, "step 99: rank 0")
    with life:
        pass
    assert (read_lives(tmp_path)[0].slow, read_lives(tmp_path)[0].reason) == ("step 99: rank 0", "finished")


def test_where_ranks_exchange_weights_in_the_encoder_a_slow_chip_is_named(tmp_path):
    first, _ = run_ranks(steps_of_a_slow_rank, 2, str(tmp_path), False)
    assert [line.get("slow_rank") for line in first] == [1, 1, None]
    assert [line["pass_spread"] for line in first] == [2.0, 2.0, 0.0]


def test_a_note_that_cannot_be_written_does_not_end_a_run(tmp_path):
    note_slow(tmp_path / "nowhere", "step 1: rank 0")
    assert read_lives(tmp_path / "nowhere") == []
