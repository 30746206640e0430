"""The work of the loader's workers: (step, micro-step) -> one whole Batch of this rank."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import Batch, Layout, make_batch
from pretrain.contracts import Source
from pretrain.data import pulse
from pretrain.data.codes import StoredCodes, look_rng
from pretrain.data.masking import mask_image, mask_text
from pretrain.data.mixing import LABEL, OTHER, SHARE
from pretrain.data.mixture import KINDS, View
from pretrain.data.order import Order, SampleRef
from pretrain.data.shards.cache import redact
from pretrain.data.shards.reader import BadSample, ShardError, ShardReader
from pretrain.data.shards.transfer import Unreachable
from pretrain.data.sources import Raw
from pretrain.data.transforms import sample_rng
from pretrain.jitter import AS_IT_IS, LOOK

# As many bad samples in a row cannot be an accident.
MAX_ATTEMPTS = 1000


class Replaced(NamedTuple):
    """A sample that could not be decoded, and why; a line of the quarantine file."""

    source: str
    shard: str
    sample: int
    error: str


class _Sample(NamedTuple):
    """One sample, decoded and masked."""

    key: str
    raw: Raw
    image_mask: np.ndarray | None  # bool [P]
    codes: np.ndarray | None  # int64 [P]; None: not stored
    inputs: np.ndarray | None  # int64 [L], what the encoder reads
    masked: np.ndarray | None  # bool [L]
    draws: np.ndarray  # float32 [sequences of this sample, numbers]
    look: Sequence[float]  # flip and jitter that its picture still lacks: a row of Batch.looks


class _Placing:
    """A transform whose first picture is made directly in its `place` in the batch. With `later` that picture lacks
    flip and jitter, and `look` has their random numbers."""

    def __init__(self, transform: Any, place: np.ndarray, later: bool):
        self._transform, self._later = transform, later
        self._place: np.ndarray | None = place
        self.look: Sequence[float] | None = None
        self.calls = 0

    def __call__(self, data: bytes, rng: Any = None) -> np.ndarray:
        place, self._place, self.calls = self._place, None, self.calls + 1
        if place is None or not self._later:
            return self._transform(data, rng, place)
        self.look = self._transform.unfinished(data, rng, place)
        return place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transform, name)


class Share(NamedTuple):
    """Which part of a global batch a data rank loads, and in how many micro-steps."""

    rank: int
    ranks: int
    accumulation: int


class Failure(NamedTuple):
    """An error for the user, on its way from a worker to the main process."""

    error: Exception


class Feed(NamedTuple):
    """One source of the mix: where its samples are and in what order they come."""

    kind: str
    source: Source
    total: int  # sequences of this kind in a global batch
    order: Order
    reader: ShardReader
    names: tuple[str, ...]  # of the shards, as keys show them
    stream: int  # this kind's random stream
    skip_bad_shards: bool
    codes: StoredCodes | None = None  # the pictures' codes; None: the visual tokenizer makes them in training


class Made(NamedTuple):
    """One micro-batch, and how long it took."""

    batch: Batch
    replaced: list[Replaced]
    read_s: float
    decode_s: float  # for the rest: decoding, transforms, tokens, masks
    done: float  # when it was done, by the monotonic clock, which all processes share


class MicroBatches:
    """(step, micro-step) -> Made, or a Failure. It may be forked or pickled, and runs in one thread."""

    def __init__(
        self, feeds: list[Feed], layout: Layout, view: View, share: Share, seed: int, *, jitter_later: bool = False
    ):
        self.feeds, self.layout, self.view, self.share, self.seed = feeds, layout, view, share, seed
        self.jitter_later = jitter_later
        self._read_s = 0.0

    @property
    def pictures(self) -> tuple[int, ...]:
        """The shape of a micro-batch's pictures, uint8."""
        size = self.view.transform.size if self.view.transform else 1
        return self.layout.images + self.layout.pairs, 3, size, size

    def make(self, item: tuple[int, int], pictures: np.ndarray) -> Made | Failure:
        """The micro-batch of `item`, (step, micro-step). `pictures`: memory to fill, which becomes the batch's
        `images`."""
        start, self._read_s = time.monotonic(), 0.0
        try:
            replaced: list[Replaced] = []
            samples = {feed.kind: self._samples(feed, *item, replaced, pictures) for feed in self.feeds}
            batch = self._stack(samples, pictures)
        except Unreachable as error:
            return Failure(TimeoutError(str(error)))  # not the user's mistake: a later start may succeed
        except (ShardError, ValueError, OSError) as error:
            return Failure(error)
        done = time.monotonic()
        return Made(batch, replaced, self._read_s, done - start - self._read_s, done)

    def _samples(
        self, feed: Feed, step: int, micro: int, replaced: list[Replaced], pictures: np.ndarray
    ) -> list[_Sample]:
        rank, ranks, accumulation = self.share
        size = feed.total // (ranks * accumulation)
        first = (rank * accumulation + micro) * size
        rows = feed.order.rows(step, feed.total)[first : first + size]
        before = {"dual": self.layout.images - self.layout.dual, "pairs": self.layout.images}.get(feed.kind, 0)
        samples = []
        for number, row in enumerate(rows.tolist(), before):
            pulse.beat()
            place = pictures[number] if feed.kind != "texts" and self.view.transform else None
            samples.append(self._sample(feed, SampleRef(*row), replaced, place))
        return self._mixed(feed, samples, rows)

    def _mixed(self, feed: Feed, samples: list[_Sample], rows: np.ndarray) -> list[_Sample]:
        """The samples with partners' pictures blended, if the source has `mixing` and trains; see mixing.py."""
        mixing = getattr(feed.source, "mixing", None)
        if mixing is None or not (self.view.transform and self.view.transform.train):
            return samples
        mixed = []
        for one, other, row in zip(samples[::2], samples[1::2], rows[::2].tolist(), strict=True):
            rng = sample_rng(self.seed, row[0], feed.order.number(SampleRef(*row)), len(KINDS) + feed.stream)
            assert one.raw.image is not None and other.raw.image is not None
            share = mixing.blend(one.raw.image, other.raw.image, rng)
            for own, partner in ((one, other), (other, one)):
                extra = {**own.raw.extra, OTHER: partner.raw.extra[LABEL], SHARE: share}
                mixed.append(own._replace(raw=own.raw._replace(extra=extra)))
        return mixed

    def _sample(self, feed: Feed, ref: SampleRef, replaced: list[Replaced], place: np.ndarray | None) -> _Sample:
        """The sample, or the one that Order.replacement chooses instead; its picture is made in `place`."""
        attempt = skipped = 0
        tried = [ref.shard]  # the shards of the stream that were tried, the sample's own first
        problem, stand_in = "", ref
        for _ in range(MAX_ATTEMPTS):
            try:
                members = self._read(feed, stand_in)
                number = feed.order.turn(ref) % (getattr(feed.source, "crops", 0) or 1)
                codes = feed.codes.read(stand_in.shard, stand_in.sample, number) if feed.codes else None
                raw, look, rng = self._decode(feed, ref, members, place, self.jitter_later)
                key = f"{feed.kind}/{feed.names[stand_in.shard]}/{members['__key__'].decode('utf-8', 'replace')}"
                return self._mask(feed.kind, key, raw, codes, rng)._replace(look=look)
            except BadSample as error:
                attempt, problem = attempt + 1, str(error)
            except ShardError as error:
                if not feed.skip_bad_shards:
                    raise
                attempt, skipped, problem = 0, len(tried), str(error)
            shard = feed.reader.manifest.shards[stand_in.shard]
            replaced.append(Replaced(feed.kind, redact(shard.url), stand_in.sample, problem))
            try:
                stand_in = feed.order.replacement(ref, attempt, skipped)
            except ValueError:  # no other sample is left
                break
            if stand_in.shard != tried[-1]:
                tried.append(stand_in.shard)
        raise ValueError(
            f"mix.{feed.kind}: {len(replaced)} samples in a row cannot be used, the last one because: {problem}; "
            "run python -m data_tools.verify on its shards"
        )

    def _decode(
        self, feed: Feed, ref: SampleRef, members: dict[str, bytes], place: np.ndarray | None, later: bool
    ) -> tuple[Raw, Sequence[float], np.random.Generator]:
        """The decoded sample, the flip and jitter that its picture still lacks (a row of Batch.looks), and the
        generator for its masks and draws."""
        # Seeded by the requested sample, so that its replacement, if also read on its own, has another crop.
        rng = own = sample_rng(self.seed, ref.epoch, feed.order.number(ref), feed.stream)
        if crops := getattr(feed.source, "crops", 0):
            # Seeded by the sample that is read: its stored codes belong to its own looks.
            own = look_rng(self.seed, members["__key__"], feed.order.turn(ref) % crops)
        placing = None if place is None else _Placing(self.view.transform, place, later)
        raw = feed.source.decode(members, placing or self.view.transform, self.view.tokenizer, own)
        if place is None or placing is None or placing.look is None:
            return raw, AS_IT_IS, rng
        if placing.calls == 1 and raw.image is not None and _same(raw.image, place):
            return raw, placing.look, rng
        # The source has changed the picture, so that the device cannot finish it: once more, with flip and jitter.
        return self._decode(feed, ref, members, place, later=False)

    def _read(self, feed: Feed, ref: SampleRef) -> dict[str, bytes]:
        start = time.monotonic()
        try:
            return feed.reader.read(ref.shard, ref.sample, feed.source.wanted)
        finally:
            self._read_s += time.monotonic() - start

    def _mask(self, kind: str, key: str, raw: Raw, codes: np.ndarray | None, rng: np.random.Generator) -> _Sample:
        """Chooses what is hidden of a sample, and draws its random numbers."""
        view, image_mask, inputs, masked = self.view, None, None, None
        image_ratio, text_ratio = view.masking.ratios(kind) if view.masking else (0.0, 0.0)
        if raw.image is not None:
            image_mask = mask_image(view.grid, image_ratio, rng)
        if raw.ids is not None:
            assert view.tokenizer is not None
            mask_id, mask_eos = view.tokenizer.mask_id, view.masking is not None and view.masking.mask_eos
            inputs, masked = mask_text(raw.ids, text_ratio, mask_id=mask_id, rng=rng, mask_eos=mask_eos)
        # A dual pair is two sequences. Drawn last, so that the masks do not depend on whether draws are needed.
        draws = rng.random((2 if kind == "dual" else 1, sum(view.draws.values())), dtype=np.float32)
        return _Sample(key, raw, image_mask, codes, inputs, masked, draws, AS_IT_IS)

    def _stack(self, samples: dict[str, list[_Sample]], pixels: np.ndarray) -> Batch:
        """One batch of all samples; `pixels` is the memory of the pictures that were made in place."""
        everything = [sample for kind in KINDS for sample in samples.get(kind, [])]
        images, pairs, dual, texts = (samples.get(kind, []) for kind in ("images", "pairs", "dual", "texts"))
        pictures, words, layout = images + dual + pairs, dual + texts, self.layout
        shown = [sample.raw.image for sample in pictures]
        # Pictures that a source made itself, or from several looks, are not in place.
        in_place = all(image is not None and _same(image, pixels[n]) for n, image in enumerate(shown))
        return make_batch(
            layout,
            images=torch.from_numpy(pixels) if in_place else _tensor(shown, np.uint8, *pixels.shape[1:]),
            image_masks=_tensor([sample.image_mask for sample in pictures], np.bool_, layout.patches),
            pair_tokens=_tensor([sample.raw.ids for sample in pairs], np.int64, layout.pair_len),
            pair_inputs=_tensor([sample.inputs for sample in pairs], np.int64, layout.pair_len),
            pair_masked=_tensor([sample.masked for sample in pairs], np.bool_, layout.pair_len),
            text_tokens=_tensor([sample.raw.ids for sample in words], np.int64, layout.text_len),
            text_inputs=_tensor([sample.inputs for sample in words], np.int64, layout.text_len),
            text_masked=_tensor([sample.masked for sample in words], np.bool_, layout.text_len),
            draws=self._draws([s.draws[0] for s in pictures] + [s.draws[-1] for s in words]),
            looks=_tensor([sample.look for sample in pictures], np.float64, LOOK) if self.jitter_later else None,
            image_codes=self._codes(pictures) if any(feed.codes for feed in self.feeds) else None,
            extra=_extras(everything),
            keys=tuple(sample.key for sample in everything),
        ).indexed()

    def _codes(self, pictures: list[_Sample]) -> Tensor:
        """int64 [N, P]; zeros for kinds without stored codes."""
        patches = self.view.grid**2
        none = np.zeros(patches, np.int64)
        return _tensor([none if p.codes is None else p.codes for p in pictures], np.int64, patches)

    def _draws(self, sequences: list[np.ndarray]) -> dict[str, Tensor]:
        """Batch.draws: [sequences, numbers] for each name, in the order of the layout: images, pairs, texts."""
        widths = list(self.view.draws.values())
        whole = _tensor(sequences, np.float32, sum(widths))
        parts = (part.contiguous() for part in whole.split(widths, dim=1))
        return dict(zip(self.view.draws, parts, strict=True)) if widths else {}


def _extras(samples: list[_Sample]) -> dict[str, Any]:
    """The sources' extra values, by name: arrays and numbers of one shape as a tensor, others as a tuple."""
    extras: dict[str, list[Any]] = {}
    for sample in samples:
        for name, value in sample.raw.extra.items():
            extras.setdefault(name, []).append(value)
    stacked: dict[str, Any] = {}
    for name, values in extras.items():
        numeric = all(isinstance(value, int | float | np.ndarray | np.generic) for value in values)
        same = numeric and len({np.shape(value) for value in values}) == 1
        stacked[name] = torch.from_numpy(np.stack([np.asarray(value) for value in values])) if same else tuple(values)
    return stacked


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether they are one array: the same memory, shape and type."""
    of_a, of_b = a.__array_interface__, b.__array_interface__
    return all(of_a[name] == of_b[name] for name in ("data", "shape", "typestr", "strides"))


def _tensor(rows: list, dtype, *shape: int) -> Tensor:
    """[rows, *shape], also without rows."""
    return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, *shape), dtype=dtype))
