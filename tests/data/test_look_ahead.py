"""Remote shards are fetched ahead, in the order of the steps, within the cache; once, whoever needs them first."""

from __future__ import annotations

import time
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace

import pytest

from pretrain.data import look_ahead
from pretrain.data.look_ahead import places_ahead
from pretrain.data.micro_batches import Share
from pretrain.data.order import Order
from pretrain.data.sources import TextShards
from tests.data.test_loader import by_key
from tests.toys import text_sample, write_source

SHARDS, SAMPLES, TOTAL = 12, 8, 4


def feed(size: int = 10) -> SimpleNamespace:
    shards = [SimpleNamespace(bytes=size)] * SHARDS
    order = Order([SAMPLES] * SHARDS, seed=3, streams=2, block_shards=2)
    return SimpleNamespace(order=order, total=TOTAL, reader=SimpleNamespace(manifest=SimpleNamespace(shards=shards)))


def needed(order: Order, rank: int, ranks: int, step: int) -> list[tuple[int, int]]:
    size = TOTAL // ranks
    refs = order.batch(step, TOTAL)[rank * size : (rank + 1) * size]
    return [(0, shard) for shard in dict.fromkeys(ref.shard for ref in refs)]


def until_idle(places) -> list:
    return list(takewhile(lambda place: place is not None, places))


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("room", [0, 25, 60, 10**9])
def test_shards_come_in_their_order_within_the_room_and_before_they_are_needed(rank, ranks, room) -> None:
    one, steps = feed(), SHARDS * SAMPLES // TOTAL
    share, step = Share(rank, ranks, 1), SimpleNamespace(value=0)
    places, fetched = places_ahead([one], share, step, steps, room), []
    for now in range(steps + 1):
        step.value = now
        new = until_idle(places)
        fetched += new
        if now < steps:
            assert set(needed(one.order, rank, ranks, now + 1)) <= set(fetched)  # one step ahead, whatever the room
        if not now:
            # No step is begun once the room is used, and a step adds as many shards as there are streams at most.
            assert 10 * len(new) <= max(room + 30, 30) and (len(new) > 2 or room < 100)
    whole = [place for number in range(1, steps + 1) for place in needed(one.order, rank, ranks, number)]
    assert list(dict.fromkeys(fetched)) == list(dict.fromkeys(whole))
    if room > 1000:
        assert fetched == list(dict.fromkeys(whole))


def test_it_goes_no_further_than_so_many_steps_and_skips_those_that_are_over(monkeypatch) -> None:
    monkeypatch.setattr(look_ahead, "STEPS", 3)
    one, step = feed(), SimpleNamespace(value=0)
    places = places_ahead([one], Share(0, 1, 1), step, 1000, 10**9)
    first = until_idle(places)
    assert first == list(dict.fromkeys(place for s in (1, 2, 3) for place in needed(one.order, 0, 1, s)))
    step.value = 100
    assert set(until_idle(places)) <= {place for s in (101, 102, 103) for place in needed(one.order, 0, 1, s)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_finds_its_remote_shards_in_the_cache(build, tmp_path: Path, workers: int) -> None:
    shards = [[text_sample(f"{s}-{n}", f"document {n} of many words") for n in range(SAMPLES)] for s in range(SHARDS)]
    local = write_source(tmp_path / "source", shards)
    remote = f"pipe:cat {local}/{{00000..{SHARDS - 1:05d}}}.tar"
    options = {"counts": {"texts": TOTAL}, "transform": None}
    loading = {"workers": workers, "prefetch": 1, "cache_dir": str(tmp_path / "cache"), "cache_gib": 1.0}
    expected = [
        by_key(step) for step in build(mix={"texts": TextShards(str(local), text_len=16)}, **options).batches(0, 24)
    ]
    source = TextShards(remote, text_len=16)
    batches = build(mix={"texts": source}, loading=loading, **options).batches(0, 24)
    got = [by_key(next(batches))]
    end = time.monotonic() + 60
    while (there := len(list((tmp_path / "cache").glob("*.shard")))) < 2 * SHARDS and time.monotonic() < end:
        time.sleep(0.05)
    assert there == 2 * SHARDS  # an index each; the first step needs two shards
    assert got + [by_key(step) for step in batches] == expected
