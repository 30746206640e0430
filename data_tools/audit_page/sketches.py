"""Counts over any number of samples in bounded memory; each says how far it may be off."""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class TopCounter:
    """The most frequent of many things (Misra and Gries, 1982): of more than `limit`, the rare ones are forgotten. A
    count may then be too low, by at most `error`."""

    def __init__(self, limit: int):
        self.limit, self.error, self._counts = limit, 0, Counter[str]()

    def add(self, counts: Mapping[str, int]) -> None:
        self._counts.update(counts)
        if len(self._counts) > self.limit:
            # Half of the limit stays, so that this happens seldom.
            ordered = sorted(self._counts.values(), reverse=True)
            cut = ordered[self.limit // 2]
            self.error += cut
            self._counts = Counter({name: count - cut for name, count in self._counts.items() if count > cut})

    def most(self, number: int) -> list[tuple[str, int]]:
        """(thing, count), the most frequent first, equal ones by name."""
        return heapq.nsmallest(number, self._counts.items(), key=lambda item: (-item[1], item[0]))

    def __len__(self) -> int:
        return len(self._counts)


class Repeats:
    """How many of many things came before, by 64-bit hash. Above `limit` different things only those whose hash ends in
    enough zeros are counted, and the result is scaled up: an estimate from `limit` / 2 of them or more."""

    def __init__(self, limit: int = 4_000_000):
        self.limit, self.total, self._zeros = limit, 0, 0
        self._hashes, self._counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._waiting: list[np.ndarray] = []  # merging costs a sort of everything, so it is done seldom

    @property
    def exact(self) -> bool:
        return self._zeros == 0

    def add(self, hashes: np.ndarray) -> None:
        """uint64 [N]"""
        self.total += len(hashes)
        self._waiting.append(hashes[self._chosen(hashes)])
        if sum(map(len, self._waiting)) > self.limit // 4:
            self._merge()

    def again(self) -> int:
        """How many were there before."""
        self._merge()
        if not self.total:
            return 0
        return round(self.total * (1 - len(self._hashes) / max(int(self._counts.sum()), 1)))

    def _merge(self) -> None:
        new, counts = np.unique(np.concatenate([*self._waiting, self._hashes[:0]]), return_counts=True)
        self._waiting.clear()
        merged, place = np.unique(np.concatenate([self._hashes, new]), return_inverse=True)
        total = np.zeros(len(merged), np.int64)
        np.add.at(total, place, np.concatenate([self._counts, counts]))
        self._hashes, self._counts = merged, total
        while len(self._hashes) > self.limit:
            self._zeros += 1
            stay = self._chosen(self._hashes)
            self._hashes, self._counts = self._hashes[stay], self._counts[stay]

    def _chosen(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes & np.uint64(2**self._zeros - 1)) == 0


class Drawn:
    """At most `limit` things, drawn at random: those of the lowest lots. The same whatever the order they come in."""

    def __init__(self, limit: int):
        self.limit = limit
        self._heap: list[tuple[float, str, Any]] = []  # the highest lot on top

    def add(self, lot: float, name: str, thing: Any) -> None:
        """`name` is unique: it decides between equal lots."""
        if len(self._heap) < self.limit:
            heapq.heappush(self._heap, (-lot, name, thing))
        elif self._heap and -lot > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-lot, name, thing))

    def merge(self, other: Drawn) -> None:
        for lot, name, thing in other._heap:
            self.add(-lot, name, thing)

    def things(self) -> list[Any]:
        """In the order of their lots, lowest first."""
        return [thing for _, _, thing in sorted(self._heap, key=lambda item: (-item[0], item[1]))]


def hash_of(*names: str) -> int:
    """64 bits that follow from the names, the same on every machine."""
    text = "\0".join(names).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def lot(seed: int, *names: str) -> float:
    """A number from 0 to 1 to draw samples by."""
    return hash_of(str(seed), *names) / 2**64


@dataclass
class Histogram:
    """How many values fall between each two edges; the first and the last bin take what lies beyond."""

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
        """The edges of the bin that holds the value below which `share` of all lie."""
        if not self.total:
            return 0.0, 0.0
        at = int(np.searchsorted(np.cumsum(self.counts), share * self.total, side="right"))
        at = min(at, int(np.flatnonzero(self.counts)[-1]))
        return float(self.edges[at]), float(self.edges[at + 1])
