"""Weights in the data's order: exact over epochs, the same for all ranks and restarts, and as often as they say."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.order import Order, SampleRef
from pretrain.data.weighted import WeightedOrder, balanced, classes_of_samples, classes_of_shards

few = settings(max_examples=60)
LABELS = st.lists(st.lists(st.integers(0, 3), max_size=9), min_size=1, max_size=8).filter(any)
WEIGHTS = st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0, 1.7, 3.0]), min_size=4, max_size=4)
HOW = {"seed": 7, "streams": 3, "block_shards": 2}


def build(labels: list[list[int]], weights: list[float]) -> WeightedOrder | None:
    classes = classes_of_samples([np.array(own, np.int64) for own in labels])
    used = weights[: int(classes.number.max()) + 1]
    sizes = Counter(chain.from_iterable(labels))
    if not any(np.rint(used[number] * count) for number, count in sizes.items()):
        return None
    return WeightedOrder([len(own) for own in labels], classes, used, **HOW)


@few
@given(LABELS, WEIGHTS, st.integers(1, 17))
def test_over_epochs_each_sample_comes_exactly_as_often_as_its_weight_says(labels, weights, size):
    if (order := build(labels, weights)) is None:
        return
    sizes, epochs = Counter(chain.from_iterable(labels)), 6
    looks = {number: round(weights[number] * count) for number, count in sizes.items()}
    assert order.samples == sum(looks.values())
    steps = -(-epochs * order.samples // size)
    seen = list(chain.from_iterable(order.batch(step, size) for step in range(1, steps + 1)))[: epochs * order.samples]
    assert len(set(seen)) == len(seen), "no two looks are the same one"
    for epoch in range(epochs):
        own = [ref for ref in seen if ref.epoch // order.most == epoch]
        assert len(own) == order.samples
        assert Counter(labels[ref.shard][ref.sample] for ref in own) == +Counter(looks)
    often = Counter((ref.shard, ref.sample) for ref in seen)
    for shard, labels_ in enumerate(labels):
        for sample, label in enumerate(labels_):
            assert abs(often[shard, sample] - epochs * looks[label] / sizes[label]) < 1
    for ref in seen[:5]:
        assert order.replacement(ref, 0) == ref and order.number(ref) == sum(map(len, labels[: ref.shard])) + ref.sample
        if len(labels[ref.shard]) > 1:
            other = order.replacement(ref, 1)
            assert other.epoch == ref.epoch and other.shard == ref.shard and other.sample != ref.sample


@few
@given(LABELS, WEIGHTS, st.integers(1, 12))
def test_any_number_of_ranks_and_any_restart_see_the_same_batch(labels, weights, step):
    if (walked := build(labels, weights)) is None:
        return
    for before in range(1, step):
        walked.batch(before, 24)
    whole = walked.batch(step, 24)
    for world in (1, 2, 3, 8):
        share = 24 // world
        slices = [build(labels, weights).batch(step, 24)[rank * share : (rank + 1) * share] for rank in range(world)]
        assert list(chain.from_iterable(slices)) == whole


@few
@given(LABELS)
def test_weights_of_one_change_nothing(labels):
    order, plain = build(labels, [1.0] * 4), Order([len(own) for own in labels], **HOW)
    seen = sorted(chain.from_iterable(order.batch(step, 1) for step in range(1, order.samples + 1)))
    assert seen == sorted(chain.from_iterable(plain.batch(step, 1) for step in range(1, plain.samples + 1)))
    counts = [len(own) for own in labels]
    shards = WeightedOrder(counts, classes_of_shards(counts, [0] * len(counts)), [1.0], **HOW)
    assert all(shards.batch(step, 5) == plain.batch(step, 5) for step in range(1, 9)), "to the sample"


def test_shares_in_any_stretch_are_those_of_the_weights():
    """Statistically: 200 shards, a thousand samples each; a stretch of a tenth of an epoch."""
    counts = [1000] * 200
    classes = classes_of_shards(counts, [0] * 150 + [1] * 50)
    order = WeightedOrder(counts, classes, [0.5, 3.0], seed=1, streams=32, block_shards=4)
    assert order.samples == 75_000 + 150_000 and order.most == 3
    rows = order.rows(5, 20_000)
    share = (rows[:, 1] >= 150).mean()
    assert abs(share - 2 / 3) < 0.05, share
    within = rows[rows[:, 1] < 150]
    # Neither the low nor the high numbers of a shard are preferred, and no pair of neighbours.
    assert abs(within[:, 2].mean() / 999 - 0.5) < 0.02 and len(np.unique(within[:, 1])) > 20


def test_balance_gives_every_class_as_many_looks_and_keeps_the_epoch():
    rng = np.random.default_rng(0)
    labels = [rng.choice(5, 400, p=[0.6, 0.2, 0.1, 0.06, 0.04]) for _ in range(10)]
    classes = classes_of_samples(labels)
    sizes = np.bincount(np.concatenate(labels))
    counts = [len(own) for own in labels]
    order = WeightedOrder(counts, classes, balanced(classes, 1.0), seed=0, streams=4, block_shards=2)
    rows = order.rows(1, order.samples)
    assert order.samples == 4000
    assert Counter(labels[shard][sample] for _, shard, sample in rows.tolist()) == dict.fromkeys(range(5), 800)
    np.testing.assert_allclose(balanced(classes, 0.0), 1.0)
    half = balanced(classes, 0.5) * sizes
    np.testing.assert_allclose(half / half.sum(), np.sqrt(sizes) / np.sqrt(sizes).sum())


@pytest.mark.parametrize("weight", [1.0, 1.5, 4.0])
def test_every_fixed_look_has_its_turn_whatever_the_weights(weight):
    """A picture with `crops` looks, beside others that come `most` times in an epoch."""
    order, crops = WeightedOrder([5, 5], classes_of_shards([5, 5], [0, 1]), [weight, 4.0], **HOW), 4
    turns: dict[int, list[int]] = {}
    for step in range(1, 4 * crops + 1):
        for ref in order.batch(step, order.samples):
            if ref.shard == 0:
                turns.setdefault(ref.sample, []).append(order.turn(ref) % crops)
    assert len(turns) == 5 and all(set(seen) == set(range(crops)) for seen in turns.values())
    if weight == 1:
        plain = Order([5], **HOW)
        assert [plain.turn(ref) for ref in plain.batch(1, 15)] == [0] * 5 + [1] * 5 + [2] * 5
        assert all(seen == [0, 1, 2, 3] * 4 for seen in turns.values())


def test_what_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"weights=\[0\.0\] leave no look"):
        WeightedOrder([3], classes_of_shards([3], [0]), [0.0], **HOW)


def test_a_reference_of_a_look_is_a_sample_reference():
    order = WeightedOrder([2], classes_of_shards([2], [0]), [2.0], **HOW)
    assert sorted(order.batch(1, 4)) == [SampleRef(0, 0, 0), SampleRef(0, 0, 1), SampleRef(1, 0, 0), SampleRef(1, 0, 1)]
