"""Finds pairs of 64-bit hashes that differ in at most `distance` bits, in nearly linear time.

Pigeonhole: split the bits into distance + k blocks; two hashes within the distance agree in at least k of them, so only
hashes that share k blocks are compared. k is chosen by its cost (Manku et al., "Detecting Near-Duplicates for Web
Crawling", WWW 2007, 3; Norouzi et al., "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012). Two
additions make it robust for any data. The bits are distributed so that the hashes vary about equally in all blocks. And
where many hashes share the same blocks (dark borders, one layout), they are split again by the remaining bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np

# (indices into the first, indices into the second) -> which of these pairs are accepted.
Accept = Callable[[np.ndarray, np.ndarray], np.ndarray]

_BATCH = 2**20  # pairs compared at a time: 60 MB
_FEW = 2**16  # pairs; as many or fewer are compared directly
_HEAVY = 2**19  # if more pairs share a value of a table, they are split again
_SORTING = 16  # cost of a hash in one table, in comparisons of a pair
_MOST_BLOCKS = 3
_SAMPLE = 2**14  # hashes from which costs are estimated
_EDGES = 2**21  # pairs in memory in keep_first
_FIRST = 1024  # hashes in keep_first's first portion


class Pairs(NamedTuple):
    first: np.ndarray  # int64
    second: np.ndarray  # int64
    distance: np.ndarray  # uint8, bits that differ


class Neighbours(NamedTuple):
    item: np.ndarray  # int64 [N]: each item's neighbour; -1: none
    distance: np.ndarray  # uint8 [N]: bits that differ from the neighbour


class TooManyPairs(Exception):
    """There are more pairs than the limit of near_pairs."""


def near_pairs(hashes: np.ndarray, distance: int, accept: Accept | None = None, limit: int | None = None) -> Pairs:
    """All pairs first < second of uint64 `hashes` within the distance, sorted. Memory: 17 bytes per pair and about
    200 MB. Raises TooManyPairs if there are more than `limit`."""
    portions, total = [], 0
    for pairs in _matches(hashes, None, distance, accept):
        portions.append(pairs)
        total += len(pairs.first)
        if limit is not None and total > limit:
            raise TooManyPairs(f"more than {limit} pairs within {distance} bits")
    first, second, bits = (np.concatenate(parts) for parts in zip(*portions, strict=True)) if portions else _NONE
    order = np.lexsort((second, first))
    return Pairs(first[order], second[order], bits[order])


def nearest(queries: np.ndarray, targets: np.ndarray, distance: int, accept: Accept | None = None) -> Neighbours:
    """For each query the nearest target within the distance, the first of equally near ones; -1 if there is none."""
    best = np.full(len(queries), _NOTHING)
    for first, second, bits in _matches(queries, targets, distance, accept):
        np.minimum.at(best, first, bits.astype(np.int64) << _SHIFT | second)
    none = best == _NOTHING
    return Neighbours(np.where(none, -1, best & (1 << _SHIFT) - 1), np.where(none, 0, best >> _SHIFT).astype(np.uint8))


def keep_first(hashes: np.ndarray, distance: int, accept: Accept | None = None) -> Neighbours:
    """Goes through the hashes in order and keeps each one that is not near to an earlier kept one. -> for each dropped
    item its nearest kept one; -1: it is kept.

    So chains do not collapse: of A ~ B ~ C, with A and C apart, A and C stay, and each dropped item is within the
    distance of a kept one. The result is that of the plain loop. Memory is bounded for any data: the hashes are
    processed in portions of doubling size, each compared with the items kept so far, and a portion with too many pairs
    in itself is halved.
    """
    neighbour, bits = np.full(len(hashes), -1, np.int64), np.zeros(len(hashes), np.uint8)

    def keep(portion: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        """The items of a portion that are kept, given the `earlier` kept ones; sets `neighbour` and `bits` of the
        others."""
        near = nearest(hashes[portion], hashes[earlier], distance, _of_subsets(accept, portion, earlier))
        dropped = near.item >= 0
        neighbour[portion[dropped]] = earlier[near.item[dropped]]
        bits[portion[dropped]] = near.distance[dropped]
        rest = portion[~dropped]
        try:
            pairs = near_pairs(hashes[rest], distance, _of_subsets(accept, rest, rest), limit=_EDGES)
        except TooManyPairs:
            first = keep(rest[: len(rest) // 2], earlier[:0])
            # All of them were compared with `earlier` above: the second half needs only what the first half keeps.
            return np.concatenate([first, keep(rest[len(rest) // 2 :], first)])
        items, choices = _drop_near(pairs, len(rest))
        neighbour[rest[items]], bits[rest[items]] = rest[pairs.first[choices]], pairs.distance[choices]
        return np.delete(rest, items)

    survivors, start = np.empty(0, np.int64), 0
    while start < len(hashes):
        stop = min(len(hashes), max(2 * start, _FIRST))
        survivors = np.concatenate([survivors, keep(np.arange(start, stop), survivors)])
        start = stop
    return Neighbours(neighbour, bits)


def _drop_near(pairs: Pairs, items: int) -> tuple[np.ndarray, np.ndarray]:
    """(the items to drop, and for each the pair with its nearest kept item)."""
    order = np.lexsort((pairs.first, pairs.distance, pairs.second))
    is_dropped, dropped, choices = bytearray(items), [], []
    # In the order of `second`, so that its `first`, an earlier item, is decided already; of these the nearest first.
    rows = zip(order.tolist(), pairs.first[order].tolist(), pairs.second[order].tolist(), strict=True)
    for pair, first, second in rows:
        if not is_dropped[first] and not is_dropped[second]:
            is_dropped[second] = 1
            dropped.append(second)
            choices.append(pair)
    return np.array(dropped, np.int64), np.array(choices, np.int64)


def _of_subsets(accept: Accept | None, first: np.ndarray, second: np.ndarray) -> Accept | None:
    """`accept` for indices into the subsets `first` and `second`."""
    return None if accept is None else lambda i, j: accept(first[i], second[j])


_NONE = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
_SHIFT = 48  # an index has fewer bits than this
_NOTHING = np.int64(2**62)


def _matches(a: np.ndarray, b: np.ndarray | None, distance: int, accept: Accept | None) -> Iterator[Pairs]:
    """The pairs (index into a, index into b) within the distance, in portions; b None: within a, first < second."""
    if not 0 <= distance < 64:
        raise ValueError(f"distance={distance} is wrong because hashes have 64 bits; use 0 to 16")
    a = np.ascontiguousarray(a, np.uint64)
    b = None if b is None else np.ascontiguousarray(b, np.uint64)
    everything = np.arange(len(a))
    others = None if b is None else np.arange(len(b))
    for first, second in _candidates(a, everything, b, others, list(range(64)), distance, ()):
        if accept is not None and len(first):
            accepted = accept(first, second)
            first, second = first[accepted], second[accepted]
        if len(first):
            yield Pairs(first, second, np.bitwise_count(a[first] ^ (a if b is None else b)[second]))


def _candidates(
    a: np.ndarray,
    left: np.ndarray,
    b: np.ndarray | None,
    right: np.ndarray | None,
    bits: list[int],
    distance: int,
    earlier: tuple[np.uint64, ...],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a[left] and b[right] within the distance. All of these agree outside `bits`; pairs that agree in one of
    the masks `earlier` are skipped, because an earlier table gave them."""
    tables = _tables(a[left], a[left] if b is None or right is None else b[right], bits, distance)
    if tables is None:
        lows = np.arange(1, len(left) + 1) if right is None else np.zeros(len(left), np.int64)
        highs = np.full(len(left), len(left) if right is None else len(right))
        yield from _compare(a, left, b, right, lows, highs, distance, earlier)
        return
    done = earlier
    for table in tables:
        mine, order = _sort(_key(a[left], table))
        sorted_left, sorted_right = left[order], None
        if right is None or b is None:
            theirs, lows = mine, np.arange(1, len(left) + 1)
        else:
            theirs, order = _sort(_key(b[right], table))
            sorted_right, lows = right[order], np.searchsorted(theirs, mine, side="left")
        highs = np.searchsorted(theirs, mine, side="right")
        for value in _heavy(mine, theirs):
            ours, rest = _run(mine, value), [bit for bit in bits if bit not in table]
            same_right = None if sorted_right is None else sorted_right[_run(theirs, value)]
            yield from _candidates(a, sorted_left[ours], b, same_right, rest, distance, done)
            highs[ours] = lows[ours]
        yield from _compare(a, sorted_left, b, sorted_right, lows, highs, distance, done)
        done = (*done, np.uint64(sum(1 << bit for bit in table)))


def _compare(
    a: np.ndarray,
    left: np.ndarray,
    b: np.ndarray | None,
    right: np.ndarray | None,
    lows: np.ndarray,
    highs: np.ndarray,
    distance: int,
    earlier: tuple[np.uint64, ...],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pairs of left[i] with each of right[lows[i]:highs[i]] that are within the distance; within one set, the lower
    index comes first."""
    b, right, same = (a, left, True) if b is None or right is None else (b, right, False)
    ends = np.cumsum(np.maximum(highs - lows, 0))
    mine, theirs = a[left], b[right]
    start = 0
    while start < len(left):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _BATCH, side="right")))
        counts = np.maximum(highs[start:stop] - lows[start:stop], 0)
        if total := int(ends[stop - 1] - done):
            i = np.repeat(np.arange(start, stop), counts)
            j = np.arange(total) - np.repeat(ends[start:stop] - counts - done, counts) + lows[i]
            differ = mine[i] ^ theirs[j]
            close = np.flatnonzero(np.bitwise_count(differ) <= distance)
            for mask in earlier:
                close = close[differ[close] & mask != 0]
            first, second = left[i[close]], right[j[close]]
            yield (np.minimum(first, second), np.maximum(first, second)) if same else (first, second)
        start = stop


def _tables(mine: np.ndarray, theirs: np.ndarray, bits: list[int], distance: int) -> list[list[int]] | None:
    """Sets of bits such that any two hashes within the distance agree in all bits of at least one: all choices of k out
    of distance + k blocks. k grows with the number of hashes. None if comparing all pairs costs less, so that a dense
    cluster of hashes is not split forever."""
    every, sizes = len(mine) * len(theirs), len(mine) + len(theirs)
    if every <= _FEW or min(len(mine), len(theirs)) < 2:
        return None
    # The two samples of one set must not share hashes: a hash shares all its blocks with itself.
    mine, theirs = mine[:: 2 + len(mine) // _SAMPLE], theirs[1 :: 2 + len(theirs) // _SAMPLE]
    both = np.concatenate([mine, theirs])
    uneven = {bit: abs(float(_key(both, [bit]).mean()) - 0.5) for bit in bits}
    varying = sorted((bit for bit in bits if uneven[bit] < 0.5), key=lambda bit: (uneven[bit], bit))
    best, least = None, every / 2
    for k in range(1, min(_MOST_BLOCKS, len(varying) - distance) + 1):
        tables = [list(chain(*blocks)) for blocks in combinations(_deal(varying, distance + k), k)]
        if len(tables) * sizes * _SORTING > least:
            break
        shared = sum(_share_equal(_key(mine, table), _key(theirs, table)) for table in tables)
        cost = len(tables) * sizes * _SORTING + shared * every
        if cost < least:
            best, least = tables, cost
    return best


def _deal(bits: list[int], count: int) -> list[list[int]]:
    """Deals the bits to `count` blocks, back and forth, so that no block gets the best bit of every round."""
    blocks: list[list[int]] = [[] for _ in range(count)]
    for number, at in enumerate(range(0, len(bits), count)):
        direction = blocks if number % 2 == 0 else blocks[::-1]
        for block, bit in zip(direction, bits[at : at + count], strict=False):
            block.append(bit)
    return blocks


def _share_equal(mine: np.ndarray, theirs: np.ndarray) -> float:
    """The share of all pairs that have equal keys."""
    values, counts = np.unique(mine, return_counts=True)
    theirs = np.sort(theirs)
    runs = np.searchsorted(theirs, values, "right") - np.searchsorted(theirs, values, "left")
    return float((counts * runs).sum()) / (len(mine) * len(theirs))


def _key(hashes: np.ndarray, table: list[int]) -> np.ndarray:
    """The bits of a table, side by side."""
    key: np.ndarray = np.zeros(len(hashes), np.uint32 if len(table) <= 32 else np.uint64)
    for place, bit in enumerate(table):
        key |= (hashes >> np.uint64(bit) & np.uint64(1)).astype(key.dtype) << key.dtype.type(place)
    return key


def _sort(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted keys, and their original places. Sorting both packed in one word takes a third of the time."""
    if keys.dtype == np.uint64 or len(keys) >= 2**32:
        order = np.argsort(keys)
        return keys[order], order
    packed = keys.astype(np.uint64) << np.uint64(32)
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    return (packed >> np.uint64(32)).astype(np.uint32), (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _heavy(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The values that more than _HEAVY pairs of the sorted keys share."""
    values, counts = np.unique(mine, return_counts=True)
    ends, starts = (np.searchsorted(theirs, values, side=side) for side in ("right", "left"))
    return values[counts * (ends - starts) > _HEAVY]


def _run(keys: np.ndarray, value: np.generic) -> slice:
    return slice(int(np.searchsorted(keys, value, "left")), int(np.searchsorted(keys, value, "right")))
