"""A set of URLs that fits in memory: 8 bytes for each, whatever its length."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa


class UrlSet:
    """Which URLs were there before, by 64-bit hash.

    8 bytes for each URL, and as much again for a moment while runs are merged: 160 MB for 10 million. Two different
    URLs share a hash with a probability of n^2 / 2^65: 3e-6 that it happens at all among 10 million.
    """

    def __init__(self) -> None:
        # Sorted runs, each at least twice as long as the next: a hash is looked up in a few, and merged as seldom.
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def add(self, urls: pa.Array) -> np.ndarray:
        """-> bool [rows]: which of the URLs are in the set or stood earlier in `urls`. All are in it afterwards."""
        hashes = hash_texts(urls)
        new, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(new), bool)
        for run in self._runs:
            at = np.searchsorted(run, new)
            known |= run[np.minimum(at, len(run) - 1)] == new
        again = np.ones(len(hashes), bool)
        again[first[~known]] = False
        self._keep(new[~known])
        return again

    def _keep(self, run: np.ndarray) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # merges two sorted halves in one pass
        if len(run):
            self._runs.append(run)


def hash_texts(texts: pa.Array) -> np.ndarray:
    """uint64 [rows]: the same for the same text on every machine; null counts as the empty text."""
    values = texts.cast(pa.binary()).to_pylist()
    digests = b"".join([hashlib.blake2b(value or b"", digest_size=8).digest() for value in values])
    return np.frombuffer(digests, "<u8").astype(np.uint64)
