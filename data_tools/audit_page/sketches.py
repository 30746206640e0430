"""Counts over any number of samples in bounded memory; each knows its possible error."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class TopCounter:
    """The most frequent of many names (Misra and Gries, 1982): of more than `limit`, the rare ones are forgotten. Then
    counts may be too low, by at most `error`."""

    def __init__(self, limit: int):
        self.limit, self.error, self._counts = limit, 0, Counter[str]()

    def add(self, counts: Mapping[str, int]) -> None:
        self._counts.update(counts)
        if len(self._counts) > self.limit:
            # Cut to half of the limit, so that this happens seldom.
            ordered = sorted(self._counts.values(), reverse=True)
            cut = ordered[self.limit // 2]
            self.error += cut
            self._counts = Counter({name: count - cut for name, count in self._counts.items() if count > cut})

    def most(self, number: int) -> list[tuple[str, int]]:
        """(name, count), the most frequent first, equal ones by name."""
        return heapq.nsmallest(number, self._counts.items(), key=lambda item: (-item[1], item[0]))

    def __len__(self) -> int:
        return len(self._counts)


class Repeats:
    """How many of many things repeat an earlier one, by 64-bit hash. Beyond `limit` different things only those whose
    hash ends in enough zeros are counted, and the result is scaled up: an estimate from at least about `limit` / 2."""

    def __init__(self, limit: int = 4_000_000):
        self.limit, self.total, self._zeros = limit, 0, 0
        self._hashes, self._counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._pending: list[np.ndarray] = []  # merging sorts everything, so it is done seldom

    @property
    def exact(self) -> bool:
        return self._zeros == 0

    def add(self, hashes: np.ndarray) -> None:
        """uint64 [N]"""
        self.total += len(hashes)
        self._pending.append(hashes[self._is_counted(hashes)])
        if sum(map(len, self._pending)) > self.limit // 4:
            self._merge()

    def count(self) -> int:
        """The number of repeats."""
        self._merge()
        if not self.total:
            return 0
        return round(self.total * (1 - len(self._hashes) / max(int(self._counts.sum()), 1)))

    def _merge(self) -> None:
        new, counts = np.unique(np.concatenate([*self._pending, self._hashes[:0]]), return_counts=True)
        self._pending.clear()
        merged, place = np.unique(np.concatenate([self._hashes, new]), return_inverse=True)
        total = np.zeros(len(merged), np.int64)
        np.add.at(total, place, np.concatenate([self._counts, counts]))
        self._hashes, self._counts = merged, total
        while len(self._hashes) > self.limit:
            self._zeros += 1
            counted = self._is_counted(self._hashes)
            self._hashes, self._counts = self._hashes[counted], self._counts[counted]

    def _is_counted(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes & np.uint64(2**self._zeros - 1)) == 0


class RandomSample:
    """At most `limit` random items: those with the lowest lots, so that their order does not matter."""

    def __init__(self, limit: int):
        self.limit = limit
        self._heap: list[tuple[float, str, Any]] = []  # (-lot, name, item): the highest lot on top

    def add(self, lot: float, name: str, item: Any) -> None:
        """`name` is unique: it decides between equal lots."""
        if len(self._heap) < self.limit:
            heapq.heappush(self._heap, (-lot, name, item))
        elif self._heap and -lot > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-lot, name, item))

    def merge(self, other: RandomSample) -> None:
        for negative_lot, name, item in other._heap:
            self.add(-negative_lot, name, item)

    def items(self) -> list[Any]:
        """In the order of their lots, lowest first."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: (-entry[0], entry[1]))]


def hash_of(*names: str) -> int:
    """64 bits that depend only on the names, the same on every machine."""
    text = "\0".join(names).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def lot(seed: int, *names: str) -> float:
    """A sample's random number from 0 to 1: the samples with the lowest are drawn."""
    return hash_of(str(seed), *names) / 2**64


@dataclass
class Histogram:
    """The number of values between each two edges; the first and the last bin include values beyond."""

    edges: Sequence[float]
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.counts):
            self.counts = np.zeros(len(self.edges) - 1, np.int64)

    def add(self, values: np.ndarray) -> None:
        place = np.searchsorted(self.edges, values, side="right") - 1
        place = np.clip(place, 0, len(self.counts) - 1)
        self.counts += np.bincount(place, minlength=len(self.counts))

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def bin_of(self, share: float) -> tuple[float, float]:
        """The edges of the bin with the quantile `share`."""
        if not self.total:
            return 0.0, 0.0
        at = int(np.searchsorted(np.cumsum(self.counts), share * self.total, side="right"))
        at = min(at, int(np.flatnonzero(self.counts)[-1]))
        return float(self.edges[at]), float(self.edges[at + 1])
