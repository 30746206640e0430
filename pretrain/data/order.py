"""The order of the data: a pure function of (samples per shard, seed, step). It reads nothing and has no state.

One epoch, from the outside in:

    shards  permuted by hash(seed, epoch)
    streams each whole shard, in that order, is assigned to the stream with the fewest samples so far
    blocks  `block_shards` neighbours in a stream; their samples are permuted together (Feistel, never materialised)
    epoch   the streams are dealt like piles of cards: one sample from each non-empty pile, round by round

A source whose samples have weights comes in the order of weighted.py, which is this one over looks at samples.

A global batch is the next `size` samples of this sequence, epoch after epoch, sorted by (epoch, stream, place in the
stream); rank r of W takes the r-th of W equal slices. Guarantees about locality, which tests/data/test_order.py checks:

* A shard is open only while its block is: at any time a stream reads from one block, or from two at their edge.
* If `streams` divides `size` and no stream is exhausted yet, each step takes size / streams samples from each stream.
  So with nodes <= streams at most two nodes read the same shard, and only one does if nodes divides streams.
* The tail, from the end of the shortest stream to the end of the epoch, is shorter than streams * (largest shard)
  samples if there are at least `streams` non-empty shards. There the slices shift across the streams.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_WORD = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Even, so that both halves change equally often; eight, because four leave patterns in blocks of a few samples.
_ROUNDS = 8
# What a hash is for: the same (seed, epoch, number) must not decide two things.
_FOR_SHARD, _FOR_BLOCK = 1, 2
# A step may cross the end of an epoch and then alternates between two plans.
_MAX_PLANS = 2


class SampleRef(NamedTuple):
    """A sample's position: epoch and sample count from 0, shards are numbered as in the manifest."""

    epoch: int
    shard: int
    sample: int


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(*words: int, over: np.ndarray) -> np.ndarray:
    """uint64 [n], one hash of (*words, number) for each number of `over` [n]."""
    state = np.zeros(1, np.uint64)
    for word in words:
        state = _mix((state ^ np.uint64(word & _WORD)) + _GOLDEN)
    return _mix((state ^ over.astype(np.uint64)) + _GOLDEN)


def _permute(index: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The image of `index` in a permutation of range(size) that `key` selects; all [n], elementwise.

    An unbalanced Feistel network over the bits of size - 1, applied again until the result is inside the range ("cycle
    walking": Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): fewer than two applications on average.
    """
    bits = np.frexp((size - 1).astype(np.float64))[1].astype(np.uint64)  # exact below 2**53
    low_bits = bits >> np.uint64(1)
    low_mask = (np.uint64(1) << low_bits) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low_bits)) - np.uint64(1)
    out, limit = index.astype(np.uint64), size.astype(np.uint64)
    todo = np.arange(len(out))
    while len(todo):
        shift, mask_low, mask_high, word = low_bits[todo], low_mask[todo], high_mask[todo], key[todo]
        low, high = out[todo] & mask_low, out[todo] >> shift
        for turn in range(0, _ROUNDS, 2):
            high ^= _mix(word ^ (low << np.uint64(4) | np.uint64(turn))) & mask_high
            low ^= _mix(word ^ (high << np.uint64(4) | np.uint64(turn + 1))) & mask_low
        out[todo] = high << shift | low
        todo = todo[out[todo] >= limit[todo]]
    return out.astype(np.int64)


@dataclass(frozen=True)
class _Plan:
    """One epoch. "Flat" counts samples through stream 0's shards in turn, then stream 1's, and so on.

    Memory is a few words per shard and stream; nothing is proportional to the samples.
    """

    shards: np.ndarray  # [n] shard numbers, flat
    starts: np.ndarray  # [n + 1] flat place of each shard's first sample, and the end
    place: np.ndarray  # [all shards] the index of a shard in `shards`; -1: it is empty
    block_starts: np.ndarray  # [blocks + 1] flat
    block_keys: np.ndarray  # [blocks]
    piles: np.ndarray  # [streams] stream numbers, shortest stream first
    pile_starts: np.ndarray  # [streams] flat place of each pile's first sample
    phase_starts: np.ndarray  # [streams] places in the epoch; in phase k, piles k, k + 1, ... still have samples
    phase_rounds: np.ndarray  # [streams] the round in which phase k begins

    def rows(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, sample) [count] at the places start, start + 1, ... of the epoch, sorted by flat place."""
        places = np.arange(start, start + count)
        phase = np.searchsorted(self.phase_starts, places, side="right") - 1
        rounds, pile = np.divmod(places - self.phase_starts[phase], len(self.piles) - phase)
        flat = np.sort(self.pile_starts[phase + pile] + self.phase_rounds[phase] + rounds)
        block = np.searchsorted(self.block_starts, flat, side="right") - 1
        first = self.block_starts[block]
        flat = first + _permute(flat - first, self.block_starts[block + 1] - first, self.block_keys[block])
        at = np.searchsorted(self.starts, flat, side="right") - 1
        return self.shards[at], flat - self.starts[at]


def _deal(counts: np.ndarray, streams: int) -> np.ndarray:
    """The stream of each shard, in the given order: the one with the fewest samples so far, the first among equals."""
    heap = [(0, stream) for stream in range(streams)]
    dealt = np.empty(len(counts), np.int64)
    for i, count in enumerate(counts.tolist()):
        load, stream = heap[0]
        dealt[i] = stream
        heapq.heapreplace(heap, (load + count, stream))
    return dealt


def _block_edges(stream: np.ndarray, streams: int, block_shards: int) -> np.ndarray:
    """bool [n]: which of the flat shards begin a block; `stream` [n] are their streams, ascending."""
    lengths = np.bincount(stream, minlength=streams)  # in shards
    position = np.arange(len(stream)) - (np.cumsum(lengths) - lengths)[stream]  # of a shard in its stream
    # In long streams the first blocks differ in length, so that a node does not fetch the next blocks of all its
    # streams at the same moment; in short streams that would cost more in mixing than it saves in waiting.
    shift = np.where(lengths >= 4 * block_shards, np.arange(streams) % block_shards, 0)
    return (position == 0) | ((position + shift[stream]) % block_shards == 0)


def _plan(counts: np.ndarray, seed: int, epoch: int, streams: int, block_shards: int) -> _Plan:
    full = np.flatnonzero(counts)
    permuted = full[np.argsort(_hash(seed, epoch, _FOR_SHARD, over=full), kind="stable")]
    dealt = _deal(counts[permuted], streams)
    by_stream = np.argsort(dealt, kind="stable")
    shards, stream = permuted[by_stream], dealt[by_stream]
    starts = np.concatenate([[0], np.cumsum(counts[shards])])
    place = np.full(len(counts), -1, np.int64)
    place[shards] = np.arange(len(shards))
    begins = np.flatnonzero(_block_edges(stream, streams, block_shards))
    lengths = np.zeros(streams, np.int64)
    np.add.at(lengths, stream, counts[shards])
    piles = np.argsort(lengths, kind="stable")
    phase_rounds = np.concatenate([[0], lengths[piles]])
    phase_sizes = np.diff(phase_rounds) * np.arange(streams, 0, -1)
    return _Plan(
        shards=shards,
        starts=starts,
        place=place,
        block_starts=np.append(starts[begins], starts[-1]),
        block_keys=_hash(seed, epoch, _FOR_BLOCK, over=np.arange(len(begins))),
        piles=piles,
        pile_starts=(np.cumsum(lengths) - lengths)[piles],
        phase_starts=np.cumsum(phase_sizes) - phase_sizes,
        phase_rounds=phase_rounds[:-1],
    )


def batch_number(step: int, passed: Sequence[tuple[int, int]] = ()) -> int:
    """The number (from 1) of the global batch that step `step` takes, where the batches first .. last of each run of
    `passed` are passed over. The runs rise, and no two touch."""
    number = step
    for first, last in passed:
        if number < first:
            break
        number += last - first + 1
    return number


class Order:
    """Lists the samples of every global batch of one source. Equal arguments give equal answers on every machine.

    `counts` are the samples per shard (empty shards are skipped); `streams` and `block_shards` are explained above.
    ValueError if there is no sample at all or an argument is out of range.
    """

    def __init__(self, counts: Sequence[int], *, seed: int, streams: int, block_shards: int):
        self.counts = np.asarray(counts, np.int64).reshape(-1)
        self.samples = int(self.counts.sum())
        if self.counts.size and self.counts.min() < 0:
            worst = int(self.counts.argmin())
            raise ValueError(f"counts[{worst}]={self.counts[worst]} is negative; run python -m data_tools.index again")
        if self.samples == 0:
            raise ValueError(
                f"the source is empty: its {self.counts.size} shards have no samples; check its shards pattern, "
                "and run python -m data_tools.index on the directory"
            )
        for name, value in {"streams": streams, "block_shards": block_shards}.items():
            if value < 1:
                raise ValueError(f"loading.{name}={value} is below 1; use 1 or more")
        self.seed, self.streams, self.block_shards = seed, streams, block_shards
        self._firsts = np.cumsum(self.counts) - self.counts
        self._plans: dict[int, _Plan] = {}

    def rows(self, step: int, size: int) -> np.ndarray:
        """int64 [size, 3]: epoch, shard and sample of global batch `step` (from 1), sorted as ranks slice it."""
        assert step >= 1 and size >= 1, (step, size)
        parts, start, end = [], (step - 1) * size, step * size
        while start < end:
            epoch, place = divmod(start, self.samples)
            count = min(end - start, self.samples - place)
            shard, sample = self._epoch(epoch).rows(place, count)
            parts.append(np.stack([np.full(count, epoch), shard, sample], axis=1))
            start += count
        return np.concatenate(parts)

    def batch(self, step: int, size: int) -> list[SampleRef]:
        """The samples of global batch `step` (from 1): places (step - 1) * size to step * size - 1 of the endless
        sequence of epochs. Rank r of W takes the r-th of W equal slices, micro-step a of A its a-th of A."""
        return [SampleRef(*row) for row in self.rows(step, size).tolist()]

    def number(self, ref: SampleRef) -> int:
        """The sample's number within the source, counted in manifest order; per-sample seeds use it."""
        return int(self._firsts[ref.shard]) + ref.sample

    def turn(self, ref: SampleRef) -> int:
        """Which of a sample's fixed looks comes here, before it is taken modulo their number: one further in each
        epoch."""
        return ref.epoch

    def replacement(self, ref: SampleRef, attempt: int, skip_shards: int = 0) -> SampleRef:
        """The replacement of `ref` when it cannot be decoded: a pure function of its arguments.

        Attempt 0 is `ref` itself, 1 the next sample of its shard (the first follows the last), and so on. When the
        shard is exhausted, the next shard of the same stream in that epoch follows (after the stream's last, the next
        stream's first), from the same sample number modulo its length. Neighbours in a stream are open at the same
        time, so a bad shard costs no new fetch. `skip_shards` skips that many whole shards that cannot be read,
        beginning with ref's own. ValueError when no sample remains.
        """
        plan = self._epoch(self._epoch_of(ref))
        place, offset = int(plan.place[ref.shard]), attempt
        assert place >= 0 and attempt >= 0 and skip_shards >= 0, (ref, attempt, skip_shards)
        for turn in range(skip_shards, len(plan.shards)):
            shard = int(plan.shards[(place + turn) % len(plan.shards)])
            count = int(self.counts[shard])  # of all its samples, whichever have a look in this epoch
            if offset < count:
                return SampleRef(ref.epoch, shard, (ref.sample + offset) % count)
            offset -= count
        raise ValueError(
            f"nothing can replace sample {ref.sample} of shard {ref.shard}: after {attempt} attempts and {skip_shards} "
            "skipped shards the whole source is exhausted; run python -m data_tools.verify on it"
        )

    def _counts_in(self, epoch: int) -> np.ndarray:
        """[shards]: how many places of an epoch each has."""
        return self.counts

    def _epoch_of(self, ref: SampleRef) -> int:
        return ref.epoch

    def _epoch(self, epoch: int) -> _Plan:
        if (plan := self._plans.pop(epoch, None)) is None:
            plan = _plan(self._counts_in(epoch), self.seed, epoch, self.streams, self.block_shards)
        while len(self._plans) >= _MAX_PLANS:
            self._plans.pop(next(iter(self._plans)))
        self._plans[epoch] = plan  # at the end: the least recently used one is dropped first
        return plan
