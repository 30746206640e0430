"""data_tools.pictures.near: the blocks find the same pairs as brute force, with any kind of hashes."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.pictures import near
from data_tools.pictures.near import TooManyPairs, keep_first, near_pairs, nearest


def uniform(rng, n):
    return rng.integers(0, 2**64, n, dtype=np.uint64)


def few_bits(rng, n):
    """All in one corner: most blocks are the same for all."""
    return uniform(rng, n) & np.uint64(0xFFFFF)


def heaps(rng, n):
    """Around five centres, two bits away at most."""
    centres, bits = uniform(rng, 5), np.uint64(1) << rng.integers(0, 64, (2, n)).astype(np.uint64)
    return rng.choice(centres, n) ^ bits[0] ^ bits[1]


def equals(rng, n):
    return uniform(rng, n) & np.uint64(0xF0)


KINDS = [uniform, few_bits, heaps, equals]


@pytest.fixture(params=[False, True], ids=["as it is", "cut early"])
def cutting(request, monkeypatch):
    """Makes hundreds of hashes take all the paths (splitting again, portions, halves) that otherwise need a million."""
    if request.param:
        for name, value in {"_FEW": 50, "_HEAVY": 100, "_SORTING": 0.2, "_FIRST": 16, "_EDGES": 20}.items():
            monkeypatch.setattr(near, name, value)


def brute(hashes, distance):
    first, second = np.triu_indices(len(hashes), 1)
    bits = np.bitwise_count(hashes[first] ^ hashes[second])
    close = bits <= distance
    return first[close], second[close], bits[close]


def loop(hashes, distance):
    neighbours: list[int] = []
    for one in range(len(hashes)):
        if not (np.bitwise_count(hashes[neighbours] ^ hashes[one]) <= distance).any():
            neighbours.append(one)
    return neighbours


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [0, 1, 3, 8])
def test_every_pair_is_found_once(kind, distance, cutting):
    hashes = kind(np.random.default_rng(distance), 400)
    for ours, theirs in zip(near_pairs(hashes, distance), brute(hashes, distance), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_nearest_of_another_set_is_found_the_first_of_equals(kind, cutting):
    rng = np.random.default_rng(1)
    targets = kind(rng, 300)
    queries = np.concatenate([targets[:100] ^ np.uint64(1 << 40), uniform(rng, 100)])
    apart = np.bitwise_count(queries[:, None] ^ targets)
    neighbours = nearest(queries, targets, 3)
    expected = np.where(apart.min(axis=1) <= 3, apart.argmin(axis=1), -1)
    np.testing.assert_array_equal(neighbours.item, expected)
    np.testing.assert_array_equal(neighbours.distance, np.where(expected >= 0, apart.min(axis=1), 0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [0, 3])
def test_keep_first_keeps_what_the_plain_loop_keeps(kind, distance, cutting):
    hashes = kind(np.random.default_rng(2), 600)
    neighbours = keep_first(hashes, distance)
    assert np.flatnonzero(neighbours.item < 0).tolist() == loop(hashes, distance)
    dropped = np.flatnonzero(neighbours.item >= 0)
    assert (neighbours.item[neighbours.item[dropped]] == -1).all() and (neighbours.item[dropped] < dropped).all()
    np.testing.assert_array_equal(
        np.bitwise_count(hashes[dropped] ^ hashes[neighbours.item[dropped]]), neighbours.distance[dropped]
    )
    assert (neighbours.distance <= distance).all()


def test_a_chain_does_not_collapse(cutting):
    chain = np.array([(1 << bits) - 1 for bits in range(0, 60, 2)], np.uint64)  # each 2 bits from the last
    assert np.flatnonzero(keep_first(chain, 3).item < 0).tolist() == list(range(0, 30, 2))


def test_pairs_that_are_not_accepted_do_not_count(cutting):
    hashes = np.repeat(uniform(np.random.default_rng(3), 1), 200)
    colour = np.arange(200) % 3
    neighbours = keep_first(hashes, 3, lambda i, j: colour[i] == colour[j])
    assert np.flatnonzero(neighbours.item < 0).tolist() == [0, 1, 2]
    assert (neighbours.item[3:] == colour[3:]).all()


def test_too_many_pairs_are_an_error():
    with pytest.raises(TooManyPairs):
        near_pairs(np.zeros(3000, np.uint64), 3, limit=1000)


@pytest.mark.parametrize("n", [0, 1])
def test_of_nothing_no_pair_is_found(n):
    hashes = np.zeros(n, np.uint64)
    assert len(near_pairs(hashes, 3).first) == 0
    assert keep_first(hashes, 3).item.tolist() == [-1] * n
    assert nearest(hashes, hashes[:0], 3).item.tolist() == [-1] * n


def test_an_invalid_distance_is_refused():
    with pytest.raises(ValueError, match="distance=64"):
        near_pairs(np.zeros(2, np.uint64), 64)
