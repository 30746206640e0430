"""An order in which samples occur as often as their weights say; a pure function too, over looks at samples.

Samples of one weight form a class: those of a pattern of shards, or those with one label. A class of N samples and
weight w has T = round(w N) looks in each epoch: floor(T / N) for every sample, and one more for the T mod N samples
that a Bresenham line picks in this epoch. So each epoch has the same size, any E epochs show each sample E T / N times
(to within one look), and the extra looks of an epoch are spread evenly over the shards.

A look has the number epoch * most + copy, where `most` is the highest number of looks that a sample has in an epoch. It
replaces the epoch in a sample's seed, so that two looks at a picture are two crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pretrain.data.order import Order, SampleRef
from pretrain.data.shards.reader import BadSample, ShardError, ShardReader, load_manifest

LABELS = "json"  # the member that holds a sample's label
MOST_SAMPLES = 2**31  # of a class, so that products of two such numbers fit into 64 bits


class Classes(NamedTuple):
    """Which samples form each class. Block b is the part of one class in one shard; blocks are sorted by shard."""

    shard: np.ndarray  # int64 [blocks]
    number: np.ndarray  # int64 [blocks]: the number of the class
    sizes: np.ndarray  # int64 [blocks], in samples
    # int32 [all samples]: each shard's sample numbers in the order of its blocks; None: each shard is one block.
    members: np.ndarray | None = None


def classes_of_shards(counts: Sequence[int], number: Sequence[int] | np.ndarray) -> Classes:
    """Classes of whole shards; `number` [shards]: each shard's class."""
    return Classes(np.arange(len(counts)), np.asarray(number, np.int64), np.asarray(counts, np.int64))


def classes_of_samples(labels: Sequence[np.ndarray]) -> Classes:
    """Classes by samples; `labels` [shards] of int [samples of the shard]: each sample's class."""
    shards, numbers, counts, members = [], [], [], []
    for shard, own in enumerate(labels):
        number, count = np.unique(own, return_counts=True)
        shards.append(np.full(len(number), shard))
        numbers.append(number)
        counts.append(count)
        members.append(np.argsort(own, kind="stable").astype(np.int32))
    join = np.concatenate
    return Classes(join(shards), join(numbers).astype(np.int64), join(counts).astype(np.int64), join(members))


def balanced(classes: Classes, balance: float) -> np.ndarray:
    """The weight of each class [classes]: with `balance` 1 every class has as many looks as any other, with 0 every
    sample has one look, and in between the looks of a class are proportional to N ** (1 - balance). The length of an
    epoch stays the same."""
    sizes = _sizes(classes).astype(np.float64)
    there = sizes > 0
    wanted = np.where(there, np.maximum(sizes, 1) ** (1 - balance), 0)
    return np.where(there, wanted * (sizes.sum() / wanted.sum()) / np.maximum(sizes, 1), 0)


def _sizes(classes: Classes) -> np.ndarray:
    return np.bincount(classes.number, weights=classes.sizes).astype(np.int64)


def order_of(source: Any, reader: ShardReader, *, skip_bad_shards: bool = False, **how: int) -> Order:
    """The order of a source, by its `weights` or its `balance` if it has one. `how`: the other arguments of Order.
    ValueError as Order, and for a `balance` of remote shards."""
    counts, weights = reader.manifest.counts, getattr(source, "weights", ())
    if weights:
        patterns = (source.shards,) if isinstance(source.shards, str) else source.shards
        lengths = [len(load_manifest(pattern).shards) for pattern in patterns]
        number = np.repeat(np.arange(len(lengths)), lengths)
        return WeightedOrder(counts, classes_of_shards(counts, number), weights, **how)
    if not getattr(source, "balance", 0.0):
        return Order(counts, **how)
    if reader.cache is not None:
        raise ValueError(
            f"shards={source.shards} are remote, and images.balance={source.balance} reads every label at the start; "
            "copy them to a local disk, or use weights"
        )
    labels = [np.zeros(count, np.int64) for count in counts]
    for shard, own in enumerate(labels):
        try:
            own[:] = [_label(source, reader, shard, sample) for sample in range(len(own))]
        except ShardError:
            if not skip_bad_shards:
                raise
    classes = classes_of_samples(labels)
    return WeightedOrder(counts, classes, balanced(classes, source.balance), **how)


def _label(source: Any, reader: ShardReader, shard: int, sample: int) -> int:
    try:
        return source.class_of(reader.read(shard, sample, (LABELS,)))
    except BadSample:  # as what class_of cannot use: it is of class 0 until it is replaced
        return 0


class WeightedOrder(Order):
    """`counts`, `seed`, `streams` and `block_shards` as Order's; `weights` [classes]: the mean number of looks at each
    sample of a class in an epoch. ValueError if no look remains."""

    def __init__(
        self,
        counts: Sequence[int],
        classes: Classes,
        weights: Sequence[float] | np.ndarray,
        *,
        seed: int,
        streams: int,
        block_shards: int,
    ):
        super().__init__(counts, seed=seed, streams=streams, block_shards=block_shards)
        sizes = _sizes(classes)
        assert len(weights) == len(sizes), (len(weights), len(sizes))
        if sizes.max() > MOST_SAMPLES:
            raise ValueError(f"a class of {sizes.max()} samples is too large for a weight; use at most {MOST_SAMPLES}")
        looks = np.rint(np.asarray(weights, np.float64) * sizes).astype(np.int64)
        self.samples = int(looks.sum())
        if self.samples == 0:
            raise ValueError(f"weights={list(weights)} leave no look at any sample; raise one of them")
        self._classes, safe = classes, np.maximum(sizes, 1)
        self._size, self._whole, self._extra = (each[classes.number] for each in (safe, looks // safe, looks % safe))
        self.most = int((self._whole + (self._extra > 0)).max())
        # The place of each block's first sample in its class, and in its shard.
        by_class = np.lexsort((classes.shard, classes.number))
        before = np.cumsum(classes.sizes[by_class]) - classes.sizes[by_class]
        firsts = np.cumsum(sizes) - sizes
        self._rank = np.empty(len(by_class), np.int64)
        self._rank[by_class] = before - firsts[classes.number[by_class]]
        self._offset = np.cumsum(classes.sizes) - classes.sizes - self._firsts[classes.shard]

    def turn(self, ref: SampleRef) -> int:
        # Not the look's number itself, which rises by `most` in an epoch: a sample with one look in each epoch would
        # see only some of its fixed looks.
        return sum(divmod(ref.epoch, self.most))

    def rows(self, step: int, size: int) -> np.ndarray:
        """int64 [size, 3]: look, shard and sample."""
        places = super().rows(step, size)
        parts = []
        for epoch in np.unique(places[:, 0]).tolist():  # ascending, as the rows are
            own = places[places[:, 0] == epoch]
            parts.append(self._at(epoch, own[:, 1], own[:, 2]))
        return np.concatenate(parts)

    def _at(self, epoch: int, shard: np.ndarray, place: np.ndarray) -> np.ndarray:
        """int64 [n, 3], look, shard and sample, of the places [n] in the shards [n] in an epoch."""
        looks = self._looks(epoch)
        ends, shards = np.cumsum(looks), self._classes.shard
        begins = np.searchsorted(shards, shard)  # the first block of each shard
        flat = (ends - looks)[begins] + place
        block = np.searchsorted(ends, flat, side="right")
        within = flat - (ends - looks)[block]
        count, whole, extra, size = (
            each[block] for each in (self._classes.sizes, self._whole, self._extra, self._size)
        )
        rank, more = self._rank[block], within - count * whole
        # The extra samples of a class are those at which the line rank * extra / size takes a step up.
        step = ((rank + epoch) * extra) // size + more + 1
        picked = -(-(step * size) // np.maximum(extra, 1)) - 1 - epoch - rank
        repeated = more < 0
        copy = np.where(repeated, within // count, whole)
        sample = np.where(repeated, within % count, picked) + self._offset[block]
        if self._classes.members is not None:
            sample = self._classes.members[self._firsts[shard] + sample]
        return np.stack([epoch * self.most + copy, shard, sample], axis=1)

    def _looks(self, epoch: int) -> np.ndarray:
        """int64 [blocks]: how many looks each block has in an epoch."""
        first = self._rank + epoch
        line = [(at * self._extra) // self._size for at in (first, first + self._classes.sizes)]
        return self._classes.sizes * self._whole + line[1] - line[0]

    def _counts_in(self, epoch: int) -> np.ndarray:
        looks = np.zeros(len(self.counts), np.int64)
        np.add.at(looks, self._classes.shard, self._looks(epoch))
        return looks

    def _epoch_of(self, ref: SampleRef) -> int:
        return ref.epoch // self.most
