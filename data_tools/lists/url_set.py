"""A compact set of URLs: 8 bytes for each, whatever its length."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa


class UrlSet:
    """The URLs so far, by 64-bit hash.

    8 bytes for each URL, and as much again while runs are merged: 160 MB for 10 million. The probability that any two
    of n different URLs share a hash is n^2 / 2^65: 3e-6 for 10 million.
    """

    def __init__(self) -> None:
        # Sorted runs, each at least twice as long as the next: few to search, and a hash is seldom merged.
        self._runs: list[np.ndarray] = []

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    def add(self, urls: pa.Array) -> np.ndarray:
        """Adds the URLs. -> bool [rows]: which were in the set already, or are repeated in `urls`."""
        hashes = hash_texts(urls)
        new, first = np.unique(hashes, return_index=True)
        present = np.zeros(len(new), bool)
        for run in self._runs:
            at = np.searchsorted(run, new)
            present |= run[np.minimum(at, len(run) - 1)] == new
        repeats = np.ones(len(hashes), bool)
        repeats[first[~present]] = False
        self._append(new[~present])
        return repeats

    def _append(self, run: np.ndarray) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # merges two sorted halves in one pass
        if len(run):
            self._runs.append(run)


def hash_texts(texts: pa.Array) -> np.ndarray:
    """uint64 [rows], the same on every machine; null counts as the empty text."""
    values = texts.cast(pa.binary()).to_pylist()
    digests = b"".join([hashlib.blake2b(value or b"", digest_size=8).digest() for value in values])
    return np.frombuffer(digests, "<u8").astype(np.uint64)
