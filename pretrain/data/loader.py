"""The mixture -> this rank's micro-batches of every step, in an order that no rank, worker or restart can change.

An item of the dataset is (step, micro-step) and makes one whole Batch, so the workers share the micro-batches out and
torch's DataLoader hands them over in order, whatever their number. The loader has no state but the step.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler

from pretrain.batch import Batch, Layout
from pretrain.data.codes import Coding, StoredCodes, check_coding, plain
from pretrain.data.masking import Masking
from pretrain.data.micro_batches import KINDS, Failure, Feed, MicroBatches, Replaced
from pretrain.data.order import Order
from pretrain.data.shards.reader import ShardReader, load_manifest
from pretrain.data.sources import Source, TextShards
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.data.transforms import ImageTransform

log = logging.getLogger(__name__)

# The first ones are named in the log, the quarantine file has all.
LOGGED = 10


@dataclass(frozen=True)
class Loading:
    """How samples are fetched; nothing here but `streams` and `block_shards` (the order) and `skip_bad_shards` changes
    what a step sees."""

    workers: int = 2
    streams: int = 64
    block_shards: int = 8
    cache_dir: str | None = None
    cache_gib: float = 50.0
    skip_bad_shards: bool = False
    prefetch: int = 4  # micro-batches that each worker makes ahead

    def __post_init__(self) -> None:
        for name, least in {"workers": 0, "streams": 1, "block_shards": 1, "prefetch": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"loading.{name}={getattr(self, name)} is wrong because it is below {least}; use {least}"
                )


class _Steps(Sampler):
    """(step, micro-step) of steps start + 1 to stop, in order, never as a list."""

    def __init__(self, start: int, stop: int, accumulation: int):
        self.steps, self.accumulation = range(start + 1, stop + 1), accumulation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((step, micro) for step in self.steps for micro in range(self.accumulation))

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation


class Loader:
    """`counts` are the sequences of each kind in one global batch, over all ranks and micro-steps; `mix` has the same
    keys: "images", "pairs" and "texts" in any combination, or "dual" alone (pairs seen as an image and a text apart).

    `noise`: so many random numbers for each sequence, see Batch.noise. `trace`: a directory for
    samples.rankNNNNN.jsonl, the keys of each step that was handed out. `quarantine`: a file that gets one JSON line
    for each sample that was replaced. Raises ValueError for what cannot be loaded as asked.
    """

    def __init__(
        self,
        mix: Mapping[str, Source],
        *,
        counts: Mapping[str, int],
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        tokenizer: TextTokenizer | None,
        transform: ImageTransform | None,
        masking: Masking | None,
        patch_size: int,
        loading: Loading,
        noise: int = 0,
        trace: str | os.PathLike[str] | None = None,
        quarantine: str | os.PathLike[str] | None = None,
    ):
        assert 0 <= rank < world and accumulation >= 1, (rank, world, accumulation)
        _check_mix(mix, counts, world, accumulation, tokenizer, transform, patch_size)
        self.accumulation, self.rank, self.world, self.loading = accumulation, rank, world, loading
        self.trace = Path(trace) if trace else None
        self.quarantine = Path(quarantine) if quarantine else None
        self.replaced = 0  # samples of this rank, so far
        self.feeds = [_feed(kind, mix[kind], counts[kind], seed, loading) for kind in KINDS if kind in mix]
        self.layout = _layout(mix, counts, world * accumulation, transform, patch_size)
        if transform is not None and transform.train and masking is not None:
            hidden = {feed.kind for feed in self.feeds if masking.ratios(feed.kind)[0]}
            self.feeds = [
                _with_codes(feed, transform, seed, self.layout.patches - 1) if feed.kind in hidden else feed
                for feed in self.feeds
            ]
        self._dataset = MicroBatches(
            self.feeds,
            self.layout,
            slices=world,
            part=rank,
            accumulation=accumulation,
            seed=seed,
            tokenizer=tokenizer,
            transform=transform,
            masking=masking,
            patch_size=patch_size,
            noise=noise,
        )

    @property
    def samples(self) -> dict[str, int]:
        """How many samples an epoch of each kind has."""
        return {feed.kind: feed.order.samples for feed in self.feeds}

    @property
    def digests(self) -> dict[str, str]:
        """What the order depends on beside seed and step: to compare on resume."""
        return {feed.kind: feed.reader.manifest.digest for feed in self.feeds}

    def batches(self, start: int, stop: int) -> Generator[list[Batch], None, None]:
        """This rank's micro-batches of the steps start + 1 to stop, a list per step. Raises what a worker raised:
        ShardError for a shard that cannot be read, ValueError, OSError."""
        workers = self.loading.workers
        loader = DataLoader(
            self._dataset,
            sampler=_Steps(start, stop, self.accumulation),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.loading.prefetch if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            # Its own generator: torch would draw the workers' seed from the global one, which a resumed run must
            # find as it was.
            generator=torch.Generator(),
        )
        trace = self._open_trace(start)
        items = iter(loader)
        try:
            for step in range(start + 1, stop + 1):
                micro_batches = [self._accept(step, next(items)) for _ in range(self.accumulation)]
                if trace is not None:
                    keys = [key for batch in micro_batches for key in batch.keys]
                    os.write(trace, _json_line({"step": step, "keys": keys}))
                yield micro_batches
        finally:
            del items  # ends the workers
            if trace is not None:
                os.close(trace)

    def _accept(self, step: int, item: tuple[Batch, list[Replaced]] | Failure) -> Batch:
        if isinstance(item, Failure):
            raise item.error from None
        batch, replaced = item
        for bad in replaced:
            self.replaced += 1
            if self.replaced <= LOGGED:
                more = "; more of them go unnamed here" if self.replaced == LOGGED else ""
                log.warning("sample %d of %s replaced: %s%s", bad.sample, bad.shard, bad.error, more)
        if replaced and self.quarantine is not None:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.quarantine, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                for bad in replaced:  # one write each: ranks share the file, and lines must not splice
                    os.write(file, _json_line({"step": step, "rank": self.rank, **bad._asdict()}))
            finally:
                os.close(file)
        return batch

    def _open_trace(self, start: int) -> int | None:
        if self.trace is None:
            return None
        self.trace.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.trace.glob("samples.rank*.jsonl")):
            # Every file has one rank that cuts it, also those of a run that had more ranks.
            number = path.name.removeprefix("samples.rank").removesuffix(".jsonl")
            if number.isdigit() and int(number) % self.world == self.rank:
                _cut_trace(path, start)
        path = self.trace / f"samples.rank{self.rank:05d}.jsonl"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)


def _feed(kind: str, source: Source, count: int, seed: int, loading: Loading) -> Feed:
    manifest, stream = load_manifest(source.shards), list(KINDS).index(kind)
    return Feed(
        kind,
        source,
        count,
        # Two kinds may read the same shards; they should not meet the same samples in one step.
        Order(
            manifest.counts,
            seed=seed + (stream << 48),
            streams=loading.streams,
            block_shards=loading.block_shards,
        ),
        ShardReader(manifest, loading.cache_dir, loading.cache_gib),
        shard_names([shard.name for shard in manifest.shards]),
        stream,
        loading.skip_bad_shards,
    )


def _with_codes(feed: Feed, transform: ImageTransform, seed: int, patches: int) -> Feed:
    """The feed and its stored codes, if its source has some. ValueError if they are not this run's."""
    source = feed.source
    if isinstance(source, TextShards) or source.codes is None:
        return feed
    codes = StoredCodes(feed.reader, source.codes)
    # Whose codes they are is checked where the tokenizer is known: run/image_targets.py.
    check_coding(feed.kind, codes.coding, Coding(codes.coding.tokenizer, plain(transform), seed, source.crops, patches))
    return feed._replace(codes=codes)


def shard_names(files: list[str]) -> tuple[str, ...]:
    """How keys name shards: the file's name without .tar, with its number in the manifest where names repeat."""
    stems = [file.removesuffix(".tar") for file in files]
    if len(set(stems)) == len(stems):
        return tuple(stems)
    return tuple(f"{stem}-{number}" for number, stem in enumerate(stems))


def _check_mix(mix, counts, world, accumulation, tokenizer, transform, patch_size) -> None:
    if unknown := sorted(set(mix) - set(KINDS)):
        raise ValueError(f"mix.{unknown[0]} is wrong because there is no such kind; use {', '.join(KINDS)}")
    if not mix:
        raise ValueError(f"mix={{}} is wrong because it names no source; use {', '.join(KINDS)}")
    if "dual" in mix and len(mix) > 1:
        raise ValueError("mix.dual is wrong beside other kinds, because image i must belong to text i; use it alone")
    if set(mix) != set(counts):
        raise ValueError(f"batch has {sorted(counts)} where mix has {sorted(mix)}; give each kind in the mix its count")
    parts = world * accumulation
    for kind, source in mix.items():
        if not isinstance(source, KINDS[kind]):
            right = KINDS[kind].__name__
            raise ValueError(
                f"mix.{kind}={type(source).__name__}(...) is wrong because {kind} come from {right}; use that"
            )
        count = counts[kind]
        if count < 1 or count % parts:
            below = count // parts * parts
            way_out = f"{below} or {below + parts}" if below >= parts else f"{parts}"
            raise ValueError(
                f"batch.{kind}={count} is not a positive multiple of data ranks * accumulation = "
                f"{world} * {accumulation} = {parts}; use {way_out}"
            )
        if kind != "texts" and transform is None:
            raise ValueError(f"mix.{kind} needs a transform for its pictures, and there is none; give the stage one")
        if kind != "images" and tokenizer is None:
            raise ValueError(f"mix.{kind} needs a text tokenizer, and there is none; set the recipe's tokenizer")
    if transform is not None and transform.size % patch_size:
        size = transform.size // patch_size * patch_size or patch_size
        raise ValueError(
            f"transform.size={transform.size} is not a multiple of patch_size={patch_size}; "
            f"use {size} or {size + patch_size}"
        )


def _layout(mix, counts, parts: int, transform: ImageTransform | None, patch_size: int) -> Layout:
    """One micro-batch of one rank."""
    each = {kind: counts[kind] // parts for kind in mix}
    text_source = mix.get("texts") or mix.get("dual")
    return Layout(
        images=each.get("images", 0) + each.get("dual", 0),
        pairs=each.get("pairs", 0),
        texts=each.get("texts", 0) + each.get("dual", 0),
        patches=(transform.size // patch_size) ** 2 + 1 if transform else 0,
        pair_len=mix["pairs"].text_len if "pairs" in mix else 0,
        text_len=text_source.text_len if text_source else 0,
    )


def _json_line(line: dict) -> bytes:
    return json.dumps(line).encode() + b"\n"


def _cut_trace(path: Path, start: int) -> None:
    """Cuts off what lies beyond step `start`, and a line that a kill left half written."""
    keep = 0
    with path.open("r+b") as file:
        for line in file:
            step = re.match(rb'{"step": (\d+),', line)
            if step is None or int(step[1]) > start or not line.endswith(b"\n"):
                break
            keep += len(line)
        file.truncate(keep)


def _start_worker(worker: int) -> None:
    """Workers are deaf to the signals that ask a job to save and end, which schedulers send to every process: the
    main process must still get its batches for the step it is in, and ends its workers itself."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def wait_for_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
