"""Steps that are read one ahead: in their order, errors in their turn; the batches that arrive are those that went."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pretrain.parallel.copy_ahead import copied, one_ahead
from tests.toy_models import ROUTES, random_batch


def test_each_is_started_before_the_one_before_it_is_handed_over():
    told = []
    for number in one_ahead(iter(range(3)), lambda number: told.append(f"start {number}") or number):
        told.append(f"use {number}")
    assert told == ["start 0", "start 1", "use 0", "start 2", "use 1", "use 2"]
    assert list(one_ahead(iter([]), str)) == []


def test_an_error_comes_when_its_step_is_asked_for():
    def steps() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("shard 3 is gone")

    ahead = one_ahead(steps(), lambda number: number)
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(OSError, match="shard 3 is gone"):
        next(ahead)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_batches_of_every_step_arrive_with_what_the_host_knows(device):
    batches = [random_batch(ROUTES["masked data"], seed).indexed() for seed in range(3)]
    arrived = list(copied(iter([[batch] for batch in batches]), torch.device(device)))
    for (there,), batch in zip(arrived, batches, strict=True):
        known, made = there.on_host.index, batch.index
        assert (known.hidden_counts, known.lengths) == (made.hidden_counts, made.lengths)
        assert there.on_host.images.device.type == "cpu"
        for own, other in zip(there.every_tensor(), batch.every_tensor(), strict=True):
            assert own.device.type == device and torch.equal(own.cpu(), other)
