"""The mixture -> this rank's micro-batches of every step, in an order independent of ranks, workers and restarts.

A worker makes whole micro-batches, each from its (step, micro-step) alone, and pool.py returns them in order, for any
number of workers. The loader's only state is the step.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pretrain.batch import Batch
from pretrain.data.codes import Coding, StoredCodes, check_coding, plain
from pretrain.data.look_ahead import LookAhead
from pretrain.data.micro_batches import Failure, Feed, Made, MicroBatches, Share
from pretrain.data.mixture import KINDS, Mixture, View, check_mixture, layout_of
from pretrain.data.order import batch_number
from pretrain.data.pinning import pinned
from pretrain.data.pool import Item, Pool
from pretrain.data.shards.reader import ShardReader, load_manifest
from pretrain.data.weighted import order_of
from pretrain.files import Lines

log = logging.getLogger(__name__)

# The log names this many replaced samples; the quarantine file lists all of them.
LOGGED = 10
# The bytes of a row besides its pixels: ids and targets of 8 bytes, masks, random numbers.
ROW_BYTES = 24


class Loader:
    """This data rank's batches of a mixture. `trace`: a directory for samples.rankNNNNN.jsonl, which lists the keys of
    each step. `quarantine`: a file that gets one JSON line per replaced sample. Raises ValueError for a mixture that
    cannot be loaded."""

    def __init__(
        self,
        mixture: Mixture,
        view: View,
        *,
        rank: int = 0,
        ranks: int = 1,
        trace: str | os.PathLike[str] | None = None,
        quarantine: str | os.PathLike[str] | None = None,
    ):
        assert 0 <= rank < ranks and mixture.accumulation >= 1, (rank, ranks, mixture.accumulation)
        check_mixture(mixture, view, ranks)
        self.accumulation, self.rank, self.ranks, self.loading = mixture.accumulation, rank, ranks, mixture.loading
        self.trace = Path(trace) if trace else None
        self.quarantine = Path(quarantine) if quarantine else None
        self._trace_file: Lines | None = None
        self._passed: Sequence[tuple[int, int]] = ()
        self.replaced = 0  # samples of this rank, so far
        # Seconds so far in which `batches` waited for batches: for the reading of their bytes, and for all the rest.
        self.waited_read_s = self.waited_decode_s = 0.0
        self.layout = layout_of(mixture, view, ranks * mixture.accumulation)
        self.feeds = [_feed(kind, mixture, view, self.layout.patches) for kind in KINDS if kind in mixture.mix]
        share = Share(rank, ranks, mixture.accumulation)
        later = mixture.loading.jitter_on_device and _ends_with_jitter(view, self.feeds)
        self._work = MicroBatches(self.feeds, self.layout, view, share, mixture.seed, jitter_later=later)

    @property
    def bytes_ahead(self) -> int:
        """The bytes of memory that micro-batches fill which the workers have prefetched."""
        micro = int(np.prod(self._work.pictures)) + ROW_BYTES * self.layout.rows
        return self.loading.processes * self.loading.prefetch * micro

    @property
    def samples(self) -> dict[str, int]:
        """How many samples an epoch of each kind has."""
        return {feed.kind: feed.order.samples for feed in self.feeds}

    @property
    def digests(self) -> dict[str, str]:
        """{kind: digest of its shards}, on which the order depends besides seed and step; compared on resume."""
        return {feed.kind: feed.reader.manifest.digest for feed in self.feeds}

    @property
    def names_digests(self) -> dict[str, str]:
        """The digests of the time before shards had hashes."""
        return {feed.kind: feed.reader.manifest.names_digest for feed in self.feeds}

    def pass_over(self, batches: Sequence[tuple[int, int]]) -> None:
        """From now on the global batches with these numbers are passed over; see order.batch_number."""
        self._passed = batches

    def batches(self, start: int, stop: int) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of the steps start + 1 to stop, a list per step. Raises a worker's errors:
        ShardError for an unreadable shard, TimeoutError for one whose store has trouble, ValueError, OSError."""
        trace = self._trace_file = self._open_trace(start)
        try:
            with closing(self._results(start, stop)) as results:
                for step in range(start + 1, stop + 1):
                    micro_batches = [self._accept(step, self._next(results)) for _ in range(self.accumulation)]
                    if trace is not None:
                        keys = [key for batch in micro_batches for key in batch.keys]
                        trace.write(_json_line({"step": step, "keys": keys}))
                    yield micro_batches
        finally:
            if trace is not None:
                self._trace_file = None
                trace.close()

    def _results(self, start: int, stop: int) -> Generator[Made | Failure, None, None]:
        """The result of each micro-step, from the workers, or from this process if there are none."""
        first, last = (batch_number(step, self._passed) for step in (start + 1, stop))
        with LookAhead(self.feeds, self._work.share, first - 1, last) as ahead:

            def items() -> Iterator[Item]:
                for step in range(start + 1, stop + 1):
                    number = batch_number(step, self._passed)
                    ahead.reached(number)
                    yield from ((number, micro) for micro in range(self.accumulation))

            if not self.loading.processes:
                yield from (self._work.make(item, np.empty(self._work.pictures, np.uint8)) for item in items())
                return
            with Pool(self._work, self.loading.processes, self.loading.prefetch) as pool:
                yield from pinned(pool, items()) if torch.cuda.is_available() else pool.results(items())

    def _next(self, results: Iterator[Made | Failure]) -> Made | Failure:
        """The next result. The wait for it is divided between reading and the rest as the time was that it took to
        make."""
        start = time.monotonic()
        made = next(results)
        if isinstance(made, Made):
            waited, whole = max(made.done - start, 0.0), max(made.read_s + made.decode_s, 1e-9)
            self.waited_read_s += waited * made.read_s / whole
            self.waited_decode_s += waited * made.decode_s / whole
        return made

    def sync(self) -> None:
        """Makes sure that the trace, as far as it is written, survives the loss of this node."""
        if self._trace_file is not None:
            self._trace_file.sync()

    def _accept(self, step: int, made: Made | Failure) -> Batch:
        """A result's batch; logs replaced samples, and raises a worker's error."""
        if isinstance(made, Failure):
            raise made.error from None
        replaced = made.replaced
        for bad in replaced:
            self.replaced += 1
            if self.replaced <= LOGGED:
                more = "; further ones are not logged" if self.replaced == LOGGED else ""
                log.warning("sample %d of %s replaced: %s%s", bad.sample, bad.shard, bad.error, more)
        if replaced and self.quarantine is not None:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with closing(Lines(self.quarantine)) as file:  # all ranks append to it
                for bad in replaced:
                    file.write(_json_line({"step": step, "rank": self.rank, **bad._asdict()}))
        return made.batch

    def _open_trace(self, start: int) -> Lines | None:
        """This rank's trace, after cutting all traces of an earlier start off behind step `start`."""
        if self.trace is None:
            return None
        self.trace.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.trace.glob("samples.rank*.jsonl")):
            # One rank truncates each file, also those of a run that had more ranks.
            number = path.name.removeprefix("samples.rank").removesuffix(".jsonl")
            if number.isdigit() and int(number) % self.ranks == self.rank:
                last = _cut_trace(path, start)
                if last < start and int(number) == 0:  # rank 0's trace exists under every layout
                    log.warning(
                        "%s ends at step %d, not %d: lost with a node, or trace_samples was off", path, last, start
                    )
        return Lines(self.trace / f"samples.rank{self.rank:05d}.jsonl")


def _ends_with_jitter(view: View, feeds: Sequence[Feed]) -> bool:
    """Whether flip and jitter are the last things that are done to a picture."""
    transform = view.transform
    if transform is None or not transform.train or transform.rand_augment or transform.erase:
        return False
    return all(getattr(feed.source, "mixing", None) is None for feed in feeds)


def _feed(kind: str, mixture: Mixture, view: View, patches: int) -> Feed:
    source, loading, stream = mixture.mix[kind], mixture.loading, KINDS.index(kind)
    manifest = load_manifest(source.shards)
    reader = ShardReader(manifest, loading.cache_dir, loading.cache_gib)
    if not loading.skip_bad_shards:
        reader.check_some()
    return Feed(
        kind,
        source,
        mixture.counts[kind],
        # Two kinds may read the same shards; they should not get the same samples in one step.
        order_of(
            source,
            reader,
            seed=mixture.seed + (stream << 48),
            streams=loading.streams,
            block_shards=loading.block_shards,
            skip_bad_shards=loading.skip_bad_shards,
        ),
        reader,
        shard_names([shard.name for shard in manifest.shards]),
        stream,
        loading.skip_bad_shards,
        _stored_codes(kind, source, reader, view, mixture.seed, patches),
    )


def _stored_codes(
    kind: str, source: Any, reader: ShardReader, view: View, seed: int, patches: int
) -> StoredCodes | None:
    """The source's stored codes, if training needs them. ValueError if they do not match this run."""
    hidden = view.masking is not None and view.masking.ratios(kind)[0]
    ending = getattr(source, "codes", None)
    if view.transform is None or not view.transform.train or not hidden or ending is None:
        return None
    codes = StoredCodes(reader, ending)
    # run/image_targets.py checks which tokenizer they come from: only it knows the run's.
    wanted = Coding(codes.coding.tokenizer, plain(view.transform), seed, source.crops, patches)
    check_coding(kind, codes.coding, wanted)
    return codes


def shard_names(files: list[str]) -> tuple[str, ...]:
    """The shards' names in sample keys: the file name without .tar, plus its number in the manifest if names repeat."""
    stems = [file.removesuffix(".tar") for file in files]
    if len(set(stems)) == len(stems):
        return tuple(stems)
    return tuple(f"{stem}-{number}" for number, stem in enumerate(stems))


def _json_line(line: dict) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _cut_trace(path: Path, start: int) -> int:
    """Truncates the file after step `start`, and before a line that a kill interrupted; returns its last step."""
    size = last = 0
    with path.open("r+b") as file:
        for line in file:
            step = re.match(rb'{"step": (\d+),', line)
            if step is None or int(step[1]) > start or not line.endswith(b"\n"):
                break
            size, last = size + len(line), int(step[1])
        file.truncate(size)
    return last
