"""Pairs of 64-bit hashes that differ in at most `distance` bits, in time that grows little faster than their number.

Pigeonhole: cut the bits into distance + k blocks; two hashes within the distance agree in at least k of them, so only
hashes that share k blocks are compared, k being chosen by what it costs (Manku et al., "Detecting Near-Duplicates for
Web Crawling", WWW 2007, 3; Norouzi et al., "Fast Search in Hamming Space with Multi-Index Hashing", CVPR 2012). Two
additions make it safe with any data. The bits are dealt so that each block holds as much of the hashes' variety as the
others. And where many hashes share the same blocks (dark borders, one layout), these are cut again, by the bits left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, combinations
from typing import NamedTuple

import numpy as np

# (indices into the first, indices into the second) -> which of these pairs count.
Accept = Callable[[np.ndarray, np.ndarray], np.ndarray]

_AT_ONCE = 2**20  # pairs compared at a time: 60 MB
_FEW = 2**16  # pairs that are compared without ado
_HEAVY = 2**19  # pairs of one value of a table, from which on the value is cut again
_SORTING = 16  # what a hash costs in one table, measured in comparisons of a pair
_MOST_BLOCKS = 3
_SAMPLE = 2**14  # hashes that costs are estimated from
_EDGES = 2**21  # pairs held at a time when neighbours are settled
_FIRST = 1024


class Pairs(NamedTuple):
    first: np.ndarray  # int64
    second: np.ndarray  # int64
    distance: np.ndarray  # uint8, bits that differ


class Kept(NamedTuple):
    by: np.ndarray  # int64 [N]: the kept item that it is near to; -1: it is kept itself
    distance: np.ndarray  # uint8 [N]: bits that differ from it


class TooManyPairs(Exception):
    """More than the limit that near_pairs was given."""


def near_pairs(hashes: np.ndarray, distance: int, accept: Accept | None = None, limit: int | None = None) -> Pairs:
    """Every pair first < second of uint64 `hashes` within the distance, each once, sorted. Memory: 17 bytes per pair
    and some 200 MB; raises TooManyPairs instead when there are more than `limit`."""
    found, total = [], 0
    for pairs in _matches(hashes, None, distance, accept):
        found.append(pairs)
        total += len(pairs.first)
        if limit is not None and total > limit:
            raise TooManyPairs(f"more than {limit} pairs within {distance} bits")
    first, second, bits = (np.concatenate(parts) for parts in zip(*found, strict=True)) if found else _NONE
    order = np.lexsort((second, first))
    return Pairs(first[order], second[order], bits[order])


def nearest(queries: np.ndarray, targets: np.ndarray, distance: int, accept: Accept | None = None) -> Kept:
    """For each query the nearest of the targets within the distance, of equally near ones the first; or -1."""
    best = np.full(len(queries), _NOTHING)
    for first, second, bits in _matches(queries, targets, distance, accept):
        np.minimum.at(best, first, bits.astype(np.int64) << _SHIFT | second)
    none = best == _NOTHING
    return Kept(np.where(none, -1, best & (1 << _SHIFT) - 1), np.where(none, 0, best >> _SHIFT).astype(np.uint8))


def keep_first(hashes: np.ndarray, distance: int, accept: Accept | None = None) -> Kept:
    """Goes through the hashes in their order and keeps each that is not near to one kept before it.

    So chains do not swallow everything: of A ~ B ~ C, with A and C apart, A and C stay, and each dropped item is
    within the distance of a kept one. What is kept is what the plain loop keeps. Memory stays bounded with any data:
    the hashes come in portions that double, each compared with what was kept before, and a portion that is too dense
    among itself is halved.
    """
    by, bits = np.full(len(hashes), -1, np.int64), np.zeros(len(hashes), np.uint8)

    def settle(portion: np.ndarray, before: np.ndarray) -> np.ndarray:
        """Those of a portion that are kept, given all that were before it; fills in `by` and `bits` of the others."""
        near = nearest(hashes[portion], hashes[before], distance, _renamed(accept, portion, before))
        gone = near.by >= 0
        by[portion[gone]], bits[portion[gone]] = before[near.by[gone]], near.distance[gone]
        rest = portion[~gone]
        try:
            pairs = near_pairs(hashes[rest], distance, _renamed(accept, rest, rest), limit=_EDGES)
        except TooManyPairs:
            first = settle(rest[: len(rest) // 2], before[:0])
            # Those were all compared with `before` above: only what the first half keeps is new to the second.
            return np.concatenate([first, settle(rest[len(rest) // 2 :], first)])
        losers, winners = _lose(pairs, len(rest))
        by[rest[losers]], bits[rest[losers]] = rest[pairs.first[winners]], pairs.distance[winners]
        return np.delete(rest, losers)

    kept, start = np.empty(0, np.int64), 0
    while start < len(hashes):
        stop = min(len(hashes), max(2 * start, _FIRST))
        kept = np.concatenate([kept, settle(np.arange(start, stop), kept)])
        start = stop
    return Kept(by, bits)


def _lose(pairs: Pairs, items: int) -> tuple[np.ndarray, np.ndarray]:
    """(items that are near to a kept one, the pair of each with the nearest of those)."""
    order = np.lexsort((pairs.first, pairs.distance, pairs.second))
    dropped, losers, winners = bytearray(items), [], []
    # By the second of the pair: all is known of the first, which stands before it. The nearest first comes first.
    rows = zip(order.tolist(), pairs.first[order].tolist(), pairs.second[order].tolist(), strict=True)
    for pair, first, second in rows:
        if not dropped[first] and not dropped[second]:
            dropped[second] = 1
            losers.append(second)
            winners.append(pair)
    return np.array(losers, np.int64), np.array(winners, np.int64)


def _renamed(accept: Accept | None, first: np.ndarray, second: np.ndarray) -> Accept | None:
    return None if accept is None else lambda i, j: accept(first[i], second[j])


_NONE = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.uint8))
_SHIFT = 48  # an index has fewer bits than this
_NOTHING = np.int64(2**62)


def _matches(a: np.ndarray, b: np.ndarray | None, distance: int, accept: Accept | None) -> Iterator[Pairs]:
    """Portions of the pairs (index into a, index into b) within the distance; b None: within a, first < second."""
    if not 0 <= distance < 64:
        raise ValueError(f"distance={distance} is wrong because hashes have 64 bits; use 0 to 16")
    a = np.ascontiguousarray(a, np.uint64)
    b = None if b is None else np.ascontiguousarray(b, np.uint64)
    everything = np.arange(len(a))
    others = None if b is None else np.arange(len(b))
    for first, second in _candidates(a, everything, b, others, list(range(64)), distance, ()):
        if accept is not None and len(first):
            good = accept(first, second)
            first, second = first[good], second[good]
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
    """Pairs within the distance of a[left] and b[right], which agree in all but `bits`; they were found already if
    they agree in one of `earlier`."""
    tables = _tables(a[left], a[left] if b is None or right is None else b[right], bits, distance)
    if tables is None:
        lows = np.arange(1, len(left) + 1) if right is None else np.zeros(len(left), np.int64)
        highs = np.full(len(left), len(left) if right is None else len(right))
        yield from _compared(a, left, b, right, lows, highs, distance, earlier)
        return
    before = earlier
    for table in tables:
        mine, order = _sorted(_key(a[left], table))
        ordered, others = left[order], None
        if right is None or b is None:
            theirs, lows = mine, np.arange(1, len(left) + 1)
        else:
            theirs, order = _sorted(_key(b[right], table))
            others, lows = right[order], np.searchsorted(theirs, mine, side="left")
        highs = np.searchsorted(theirs, mine, side="right")
        for value in _heavy(mine, theirs):
            ours, rest = _run(mine, value), [bit for bit in bits if bit not in table]
            their = None if others is None else others[_run(theirs, value)]
            yield from _candidates(a, ordered[ours], b, their, rest, distance, before)
            highs[ours] = lows[ours]
        yield from _compared(a, ordered, b, others, lows, highs, distance, before)
        before = (*before, np.uint64(sum(1 << bit for bit in table)))


def _compared(
    a: np.ndarray,
    left: np.ndarray,
    b: np.ndarray | None,
    right: np.ndarray | None,
    lows: np.ndarray,
    highs: np.ndarray,
    distance: int,
    earlier: tuple[np.uint64, ...],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """left[i] with each of right[lows[i]:highs[i]], where they are within the distance; of one set, the lower index
    first."""
    b, right, same = (a, left, True) if b is None or right is None else (b, right, False)
    ends = np.cumsum(np.maximum(highs - lows, 0))
    mine, theirs = a[left], b[right]
    start = 0
    while start < len(left):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _AT_ONCE, side="right")))
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
    """Sets of bits, in one of which any two hashes within the distance agree: distance + k blocks, k of them at a
    time. k grows with the number of hashes. None if comparing all with all costs less: so a dense heap of hashes is
    not cut for ever."""
    every, sizes = len(mine) * len(theirs), len(mine) + len(theirs)
    if every <= _FEW or min(len(mine), len(theirs)) < 2:
        return None
    # Two samples of one set must not meet in the same hash, or each would seem to share its blocks with a thousand.
    mine, theirs = mine[:: 2 + len(mine) // _SAMPLE], theirs[1 :: 2 + len(theirs) // _SAMPLE]
    both = np.concatenate([mine, theirs])
    uneven = {bit: abs(float(_key(both, [bit]).mean()) - 0.5) for bit in bits}
    dealt = sorted((bit for bit in bits if uneven[bit] < 0.5), key=lambda bit: (uneven[bit], bit))
    best, least = None, every / 2
    for k in range(1, min(_MOST_BLOCKS, len(dealt) - distance) + 1):
        tables = [list(chain(*blocks)) for blocks in combinations(_deal(dealt, distance + k), k)]
        if len(tables) * sizes * _SORTING > least:
            break
        shared = sum(_shared(_key(mine, table), _key(theirs, table)) for table in tables)
        cost = len(tables) * sizes * _SORTING + shared * every
        if cost < least:
            best, least = tables, cost
    return best


def _deal(bits: list[int], count: int) -> list[list[int]]:
    """Like cards, to and fro, so that no block gets the best of every round."""
    blocks: list[list[int]] = [[] for _ in range(count)]
    for number, at in enumerate(range(0, len(bits), count)):
        for block, bit in zip(blocks[:: 1 - number % 2 * 2], bits[at : at + count], strict=False):
            block.append(bit)
    return blocks


def _shared(mine: np.ndarray, theirs: np.ndarray) -> float:
    """Of all pairs, how many have equal keys."""
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


def _sorted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The keys in order, and where each stood. Sorting the place along with the key takes a third of argsort's time."""
    if keys.dtype == np.uint64 or len(keys) >= 2**32:
        order = np.argsort(keys)
        return keys[order], order
    packed = keys.astype(np.uint64) << np.uint64(32)
    packed |= np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    return (packed >> np.uint64(32)).astype(np.uint32), (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _heavy(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """The values that too many pairs of the sorted keys share."""
    values, counts = np.unique(mine, return_counts=True)
    ends, starts = (np.searchsorted(theirs, values, side=side) for side in ("right", "left"))
    return values[counts * (ends - starts) > _HEAVY]


def _run(keys: np.ndarray, value: np.generic) -> slice:
    return slice(int(np.searchsorted(keys, value, "left")), int(np.searchsorted(keys, value, "right")))
