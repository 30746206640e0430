"""The invariants of DESIGN.md part 5, over random manifests."""

from __future__ import annotations

import time
import tracemalloc
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Order, SampleRef, _permute

WORLDS = (1, 2, 3, 4, 8)
COUNTS = st.lists(st.integers(0, 12), min_size=1, max_size=14).filter(any)
# counts, seed, streams, block_shards: also empty shards, shards of one sample, more streams than shards
SOURCES = st.tuples(COUNTS, st.integers(0, 2**64 - 1), st.integers(1, 6), st.integers(1, 4))
few = settings(max_examples=60)


def build(source) -> Order:
    counts, seed, streams, block_shards = source
    return Order(counts, seed=seed, streams=streams, block_shards=block_shards)


def everything(counts, epoch: int) -> list[SampleRef]:
    return [SampleRef(epoch, shard, sample) for shard, count in enumerate(counts) for sample in range(count)]


@few
@given(SOURCES, st.integers(1, 40))
def test_every_sample_comes_exactly_once_per_epoch_and_none_is_dropped(source, size):
    order, epochs = build(source), 3
    steps = -(-epochs * order.samples // size)
    seen = list(chain.from_iterable(order.batch(step, size) for step in range(1, steps + 1)))
    assert len(seen) == steps * size
    for epoch in range(epochs):
        assert sorted(ref for ref in seen if ref.epoch == epoch) == everything(source[0], epoch)
    # The rest belongs to the next epochs: a step crosses the end of an epoch and nothing is padded.
    assert len([ref for ref in seen if ref.epoch >= epochs]) == steps * size - epochs * order.samples


@few
@given(SOURCES, st.integers(1, 3), st.integers(1, 30))
def test_any_number_of_ranks_and_any_restart_see_the_same_global_batch(source, per_rank, step):
    size = 24 * per_rank  # every one of WORLDS divides it
    walked = build(source)
    for before in range(1, step):
        walked.batch(before, size)
    whole = walked.batch(step, size)
    for world in WORLDS:
        share = size // world
        # Each rank has its own object, which starts at this step as after a restart.
        slices = [build(source).batch(step, size)[rank * share : (rank + 1) * share] for rank in range(world)]
        assert list(chain.from_iterable(slices)) == whole


@few
@given(SOURCES, st.integers(1, 6), st.integers(1, 5))
def test_the_sequence_does_not_depend_on_the_batch_size(source, small, factor):
    order = build(source)
    parts = chain.from_iterable(order.batch(step, small) for step in range(1, 2 * factor + 1))
    whole = chain.from_iterable(order.batch(step, small * factor) for step in (1, 2))
    assert sorted(parts) == sorted(whole)


def test_a_small_order_is_pinned():
    """Resuming a run needs the order with which it started: if this fails, old runs can no longer be resumed."""
    order = Order([5, 0, 3, 1, 7, 4], seed=2026, streams=3, block_shards=2)
    got = [[tuple(ref) for ref in order.batch(step, 8)] for step in (1, 2, 3, 10)]
    assert got == GOLDEN


GOLDEN = [
    [(0, 2, 0), (0, 2, 2), (0, 0, 0), (0, 0, 2), (0, 0, 4), (0, 4, 2), (0, 4, 6), (0, 4, 1)],
    [(0, 3, 0), (0, 2, 1), (0, 5, 0), (0, 0, 3), (0, 0, 1), (0, 4, 5), (0, 4, 3), (0, 4, 4)],
    [(0, 5, 1), (0, 5, 2), (0, 5, 3), (0, 4, 0), (1, 5, 3), (1, 5, 2), (1, 2, 1), (1, 4, 2)],
    [(3, 2, 1), (3, 0, 0), (3, 0, 1), (3, 0, 4), (3, 4, 4), (3, 4, 2), (3, 4, 5), (3, 5, 2)],
]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1025])
def test_the_permutation_of_a_block_is_one(size):
    for key in (0, 1, 2**64 - 1):
        index = np.arange(size)
        out = _permute(index, np.full(size, size), np.full(size, key, np.uint64))
        assert sorted(out.tolist()) == index.tolist()


def test_permutations_of_four_are_all_about_equally_likely():
    keys = np.random.default_rng(0).integers(0, 2**63, 4800, dtype=np.uint64)
    turned = _permute(np.tile(np.arange(4), len(keys)), np.full(4 * len(keys), 4), np.repeat(keys, 4)).reshape(-1, 4)
    _, times = np.unique(turned, axis=0, return_counts=True)
    assert len(times) == 24
    # 200 of each are expected, with a standard deviation of 14.
    assert times.min() > 130 and times.max() < 270


def test_shuffling_mixes_across_shards_and_inside_blocks():
    shards, each, streams, block = 60, 100, 4, 4
    order = Order([each] * shards, seed=5, streams=streams, block_shards=block)
    # The first eighth of a block's time already shows every shard of every stream's block, each about equally often.
    start = order.rows(1, streams * block * each // 8)
    opened, times = np.unique(start[:, 1], return_counts=True)
    assert len(opened) == streams * block
    assert times.min() >= 3 and times.max() <= 30  # 12.5 expected
    # The place in the epoch does not predict the number in the shard.
    places = np.concatenate([order.rows(step, streams)[:, 2] for step in range(1, each * block + 1)])
    assert abs(np.corrcoef(np.arange(len(places)), places)[0, 1]) < 0.1
    # Which shards share a stream and a block changes from epoch to epoch and with the seed.
    later = order.rows(order.samples // len(start) + 1, len(start))
    other = Order([each] * shards, seed=6, streams=streams, block_shards=block).rows(1, len(start))
    assert len(np.intersect1d(opened, later[:, 1])) < len(opened)
    assert len(np.intersect1d(opened, other[:, 1])) < len(opened)


@few
@given(
    st.lists(st.integers(1, 30), min_size=6, max_size=40),
    st.integers(0, 2**32),
    st.sampled_from([1, 2, 3, 6]),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_before_the_tail_at_most_two_nodes_read_a_shard(counts, seed, streams, block_shards, per_stream):
    order = Order(counts, seed=seed, streams=streams, block_shards=block_shards)
    size, plan = streams * per_stream, order._epoch(0)
    tail = int(plan.phase_starts[1]) if streams > 1 else order.samples
    assert order.samples - tail < streams * max(counts)
    for nodes in range(1, streams + 1):
        if size % nodes:
            continue
        readers: dict[int, set[int]] = {}
        for step in range(1, tail // size + 1):
            for place, ref in enumerate(order.batch(step, size)):
                readers.setdefault(ref.shard, set()).add(place * nodes // size)
        most = max((len(who) for who in readers.values()), default=1)
        assert most <= (1 if streams % nodes == 0 else 2)


@few
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 9), st.integers(1, 4), st.integers(1, 4))
def test_a_shard_is_open_only_while_its_block_is(counts, seed, streams, block_shards):
    """So a cache of two blocks per stream fetches each shard once per epoch and node."""
    order = Order(counts, seed=seed, streams=streams, block_shards=block_shards)
    spans: dict[int, list[int]] = {}
    for place in range(order.samples):
        spans.setdefault(order.batch(place + 1, 1)[0].shard, []).append(place)
    for place in range(order.samples):
        open_now = [shard for shard, places in spans.items() if places[0] <= place <= places[-1]]
        assert len(open_now) <= streams * block_shards


def test_a_long_streams_first_block_is_shorter_for_some_streams():
    order = Order([10] * 64, seed=0, streams=4, block_shards=4)
    plan = order._epoch(0)
    edges = [np.searchsorted(plan.block_starts, start, side="right") for start in sorted(plan.pile_starts)]
    assert sorted((plan.block_starts[edges] - sorted(plan.pile_starts)).tolist()) == [10, 20, 30, 40]


@few
@given(SOURCES, st.integers(1, 20))
def test_replacements_try_every_sample_once_beginning_with_the_same_shard(source, step):
    order, counts = build(source), source[0]
    ref = order.batch(step, 1)[0]
    tried = [order.replacement(ref, attempt) for attempt in range(order.samples)]
    assert tried[0] == ref
    assert sorted(tried) == everything(counts, ref.epoch)
    assert {other.shard for other in tried[: counts[ref.shard]]} == {ref.shard}
    with pytest.raises(ValueError, match="exhausted"):
        order.replacement(ref, order.samples)
    # Skipping whole shards visits the same shards, each with its first candidate.
    shards = list(dict.fromkeys(other.shard for other in tried))
    for skipped, shard in enumerate(shards):
        assert build(source).replacement(ref, 0, skip_shards=skipped).shard == shard
    with pytest.raises(ValueError, match="exhausted"):
        order.replacement(ref, 0, skip_shards=len(shards))


def test_the_next_shard_is_in_the_same_block_if_possible():
    order = Order([3] * 8, seed=1, streams=2, block_shards=4)
    stream = [order.batch(step, 2)[0] for step in range(1, 4 * 3 + 1)]  # stream 0 has one block
    together = {ref.shard: ref for ref in stream}
    followers = [order.replacement(ref, 0, skip_shards=1).shard for ref in together.values()]
    assert len(together) == 4
    assert sum(shard in together for shard in followers) == 3  # only that of the last one is in the other stream


def test_sample_numbers_count_in_manifest_order():
    order = Order([3, 0, 2], seed=0, streams=1, block_shards=1)
    assert [order.number(ref) for ref in everything([3, 0, 2], 7)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"counts": []}, "empty"),
        ({"counts": [0, 0]}, "empty"),
        ({"counts": [2, -1]}, r"counts\[1\]=-1"),
        ({"streams": 0}, "loading.streams=0"),
        ({"block_shards": 0}, "loading.block_shards=0"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        Order(**({"counts": [1], "seed": 0, "streams": 1, "block_shards": 1} | arguments))


def test_a_plan_for_five_billion_samples_is_small_and_a_seek_fast():
    tracemalloc.start()
    try:
        start = time.process_time()  # whatever else the machine does
        order = Order(np.full(50_000, 100_000), seed=0, streams=4096, block_shards=8)
        order.batch(1, 6144)
        order.batch(2_000_000, 6144)  # a second plan: epoch 2
        built = time.process_time() - start
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert built < 10 and peak < 2**30
    seeks = []
    for step in (3, 500_000, 700_000, 800_000, 800_001):
        start = time.process_time()
        order.batch(step, 6144)
        seeks.append(time.process_time() - start)
    assert sorted(seeks)[len(seeks) // 2] < 0.1
    for step in range(1, 10_000_000, 1_000_000):
        order.batch(step, 1024)
    assert len(order._plans) <= 2
