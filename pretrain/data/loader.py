"""The mixture -> this rank's micro-batches of every step, in an order independent of ranks, workers and restarts.

The dataset maps (step, micro-step) to one whole Batch, so each worker makes whole micro-batches and torch's DataLoader
returns them in order, for any number of workers. The loader's only state is the step.
"""

from __future__ import annotations

import json
import logging
import multiprocessing.queues
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.utils.data import DataLoader, Sampler

from pretrain.batch import Batch
from pretrain.data.codes import Coding, StoredCodes, check_coding, plain
from pretrain.data.micro_batches import Failure, Feed, MicroBatches, Replaced, Share
from pretrain.data.mixture import KINDS, Mixture, View, check_mixture, layout_of
from pretrain.data.order import Order
from pretrain.data.shards.reader import ShardReader, load_manifest
from pretrain.files import Lines

log = logging.getLogger(__name__)

# The log names this many replaced samples; the quarantine file lists all of them.
LOGGED = 10
# Of a row besides its pixels: ids and targets of 8 bytes, masks, random numbers.
ROW_BYTES = 24


class _Steps(Sampler):
    """(step, micro-step) of steps start + 1 to stop, in order, generated lazily."""

    def __init__(self, start: int, stop: int, accumulation: int):
        self.steps, self.accumulation = range(start + 1, stop + 1), accumulation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in self.steps for micro in range(self.accumulation))

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation


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
        self.replaced = 0  # samples of this rank, so far
        self.layout = layout_of(mixture, view, ranks * mixture.accumulation)
        self.feeds = [_feed(kind, mixture, view, self.layout.patches) for kind in KINDS if kind in mixture.mix]
        share = Share(rank, ranks, mixture.accumulation)
        self._dataset = MicroBatches(self.feeds, self.layout, view, share, mixture.seed)

    @property
    def bytes_ahead(self) -> int:
        """Of the shared memory that the micro-batches fill which the workers have made ahead."""
        pictures, size = self.layout.images + self.layout.pairs, self._dataset.view.transform
        micro = pictures * 3 * (size.size**2 if size else 0) + ROW_BYTES * self.layout.rows
        return self.loading.workers * self.loading.prefetch * micro

    @property
    def samples(self) -> dict[str, int]:
        """How many samples an epoch of each kind has."""
        return {feed.kind: feed.order.samples for feed in self.feeds}

    @property
    def digests(self) -> dict[str, str]:
        """What the order depends on besides seed and step; compared on resume."""
        return {feed.kind: feed.reader.manifest.digest for feed in self.feeds}

    @property
    def names_digests(self) -> dict[str, str]:
        """The same as it was before shards had hashes."""
        return {feed.kind: feed.reader.manifest.names_digest for feed in self.feeds}

    def batches(self, start: int, stop: int) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of the steps start + 1 to stop, a list per step. Raises a worker's errors:
        ShardError for an unreadable shard, ValueError, OSError."""
        workers = self.loading.workers
        loader = DataLoader(
            self._dataset,
            sampler=_Steps(start, stop, self.accumulation),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.loading.prefetch if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            # A generator of its own: otherwise torch draws the workers' seed from the global one, and a resumed run
            # would get other random numbers than an uninterrupted one.
            generator=torch.Generator(),
        )
        trace = self._trace_file = self._open_trace(start)
        items = iter(loader)
        try:
            for step in range(start + 1, stop + 1):
                micro_batches = [self._accept(step, next(items)) for _ in range(self.accumulation)]
                if trace is not None:
                    keys = [key for batch in micro_batches for key in batch.keys]
                    trace.write(_json_line({"step": step, "keys": keys}))
                yield micro_batches
        except BaseException:
            for worker in getattr(items, "_workers", ()):
                worker.terminate()  # torch would wait 5 s for each that hangs in its reading
            raise
        finally:
            del items  # ends the workers
            if trace is not None:
                self._trace_file = None
                trace.close()

    def sync(self) -> None:
        """The trace, as far as it is written, survives the loss of the node."""
        if self._trace_file is not None:
            self._trace_file.sync()

    def _accept(self, step: int, item: tuple[Batch, list[Replaced]] | Failure) -> Batch:
        if isinstance(item, Failure):
            raise item.error from None
        batch, replaced = item
        for bad in replaced:
            self.replaced += 1
            if self.replaced <= LOGGED:
                more = "; further ones are not logged" if self.replaced == LOGGED else ""
                log.warning("sample %d of %s replaced: %s%s", bad.sample, bad.shard, bad.error, more)
        if replaced and self.quarantine is not None:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with closing(Lines(self.quarantine)) as file:  # which the ranks share
                for bad in replaced:
                    file.write(_json_line({"step": step, "rank": self.rank, **bad._asdict()}))
        return batch

    def _open_trace(self, start: int) -> Lines | None:
        if self.trace is None:
            return None
        self.trace.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.trace.glob("samples.rank*.jsonl")):
            # One rank truncates each file, also those of a run that had more ranks.
            number = path.name.removeprefix("samples.rank").removesuffix(".jsonl")
            if number.isdigit() and int(number) % self.ranks == self.rank:
                last = _cut_trace(path, start)
                if last < start and int(number) == 0:  # in every layout there is this one
                    log.warning(
                        "%s ends at step %d, not %d: lost with a node, or trace_samples was off", path, last, start
                    )
        return Lines(self.trace / f"samples.rank{self.rank:05d}.jsonl")


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
        Order(
            manifest.counts,
            seed=mixture.seed + (stream << 48),
            streams=loading.streams,
            block_shards=loading.block_shards,
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


def _start_worker(worker: int) -> None:
    """Makes workers ignore the signals that ask a job to save and stop, because schedulers send them to every process:
    the main process still needs the batches of its current step, and stops its workers itself."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    # By itself the queue would show a traceback and drop the batch, for which the main process waits for ever.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_cannot_hand_over)  # type: ignore[attr-defined]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
    sys.excepthook = partial(_tell, sys.excepthook)


def _cannot_hand_over(error: Exception, batch: object) -> NoReturn:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    line = f"a data worker ends, as it cannot hand over its batch: {reason} (is /dev/shm full?)\n"
    os.write(2, line.encode(errors="replace"))
    os._exit(1)


def _tell(tell: Callable[..., object], kind: type[BaseException], *rest: Any) -> None:
    """For a worker's sys.excepthook. What its own code raises the main process tells; what comes here is of the thread
    that hands batches over, whose connection ends when the main process is killed meanwhile, or has an error itself."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        tell(kind, *rest)
