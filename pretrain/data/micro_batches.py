"""(step, micro-step) -> one whole Batch of this rank: the map-style dataset under the loader. Runs in the workers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pretrain.batch import Batch, Layout, make_batch
from pretrain.data.codes import StoredCodes, look_rng
from pretrain.data.masking import Masking, mask_image, mask_text
from pretrain.data.order import Order, SampleRef
from pretrain.data.shards.cache import shown
from pretrain.data.shards.reader import BadSample, ShardError, ShardReader
from pretrain.data.sources import ImageShards, PairShards, Raw, Source, TextShards
from pretrain.data.text_tokenizer import TextTokenizer
from pretrain.data.transforms import ImageTransform, sample_rng

# In the order of the rows of a batch. A kind's place here also tells its random streams from the other kinds'.
KINDS: dict[str, type] = {"images": ImageShards, "pairs": PairShards, "dual": PairShards, "texts": TextShards}
# So many bad samples in a row are no accident.
MAX_ATTEMPTS = 1000


class Replaced(NamedTuple):
    """A sample that could not be decoded, and why; a line of the quarantine file."""

    source: str
    shard: str
    sample: int
    error: str


class _Sample(NamedTuple):
    key: str
    image: np.ndarray | None
    image_mask: np.ndarray | None  # bool [P]
    codes: np.ndarray | None  # int64 [P], where they are stored
    ids: np.ndarray | None  # int64 [L], clean
    inputs: np.ndarray | None  # int64 [L], what the encoder reads
    masked: np.ndarray | None  # bool [L]
    noise: np.ndarray  # float32 [sequences of this sample, numbers]: for drop path


class Failure(NamedTuple):
    """An error that is the user's to mend, on its way from a worker to the main process."""

    error: Exception


class Feed(NamedTuple):
    """One source of the mix: where its samples lie and in what order they come."""

    kind: str
    source: Source
    total: int  # sequences of this kind in a global batch
    order: Order
    reader: ShardReader
    names: tuple[str, ...]  # of the shards, as keys show them
    stream: int  # tells this kind's random numbers from the others'
    skip_bad_shards: bool
    codes: StoredCodes | None = None  # of the pictures, instead of the visual tokenizer's work in training


class MicroBatches(Dataset):
    """(step, micro-step) -> (Batch, what was replaced in it), or a Failure."""

    def __init__(
        self, feeds, layout, *, slices, part, accumulation, seed, tokenizer, transform, masking, patch_size, noise=0
    ):
        self.feeds: list[Feed] = feeds
        self.layout: Layout = layout
        self.slices, self.part, self.accumulation, self.seed = slices, part, accumulation, seed
        self.tokenizer: TextTokenizer | None = tokenizer
        self.transform: ImageTransform | None = transform
        self.masking: Masking | None = masking
        self.noise = noise
        self.grid = transform.size // patch_size if transform else 0

    def __getitem__(self, item: tuple[int, int]) -> tuple[Batch, list[Replaced]] | Failure:
        try:
            replaced: list[Replaced] = []
            samples = {feed.kind: self._samples(feed, *item, replaced) for feed in self.feeds}
            return self._stack(samples), replaced
        except (ShardError, ValueError, OSError) as error:
            # torch would wrap the error and its traceback into one long message.
            return Failure(error)

    def _samples(self, feed: Feed, step: int, micro: int, replaced: list[Replaced]) -> list[_Sample]:
        size = feed.total // (self.slices * self.accumulation)
        first = (self.part * self.accumulation + micro) * size
        rows = feed.order.rows(step, feed.total)[first : first + size]
        return [self._sample(feed, SampleRef(*row), replaced) for row in rows.tolist()]

    def _sample(self, feed: Feed, ref: SampleRef, replaced: list[Replaced]) -> _Sample:
        """The sample, or who stands in for it by the order's rule."""
        attempt = skipped = 0
        walked = [ref.shard]  # the stream's shards from the sample's own on, as far as they were looked at
        problem, stand_in = "", ref
        for _ in range(MAX_ATTEMPTS):
            # Of the sample that was meant: who stands in is not seen twice with the same crop.
            rng = sample_rng(self.seed, ref.epoch, feed.order.number(ref), feed.stream)
            try:
                members = feed.reader.read(stand_in.shard, stand_in.sample, feed.source.wanted)
                look, view = rng, 0
                if not isinstance(feed.source, TextShards) and feed.source.crops:
                    # Of the sample that is read: its codes are those of its own looks.
                    view = ref.epoch % feed.source.crops
                    look = look_rng(self.seed, members["__key__"], view)
                codes = feed.codes.read(stand_in.shard, stand_in.sample, view) if feed.codes else None
                raw = feed.source.decode(members, self.transform, self.tokenizer, look)
                key = f"{feed.kind}/{feed.names[stand_in.shard]}/{members['__key__'].decode('utf-8', 'replace')}"
                return self._mask(feed.kind, key, raw, codes, rng)
            except BadSample as error:
                attempt, problem = attempt + 1, str(error)
            except ShardError as error:
                if not feed.skip_bad_shards:
                    raise
                attempt, skipped, problem = 0, len(walked), str(error)
            shard = feed.reader.manifest.shards[stand_in.shard]
            replaced.append(Replaced(feed.kind, shown(shard.url), stand_in.sample, problem))
            try:
                stand_in = feed.order.replacement(ref, attempt, skipped)
            except ValueError:  # nobody is left
                break
            if stand_in.shard != walked[-1]:
                walked.append(stand_in.shard)
        raise ValueError(
            f"mix.{feed.kind}: {len(replaced)} samples one after another cannot be used, the last one because: "
            f"{problem}; run python -m data_tools.verify on its shards"
        )

    def _mask(self, kind: str, key: str, raw: Raw, codes: np.ndarray | None, rng: np.random.Generator) -> _Sample:
        image_mask = inputs = masked = None
        image_ratio, text_ratio = self.masking.ratios(kind) if self.masking else (0.0, 0.0)
        if raw.image is not None:
            image_mask = mask_image(self.grid, image_ratio, rng)
        if raw.ids is not None:
            assert self.tokenizer is not None
            inputs, masked = mask_text(raw.ids, text_ratio, mask_id=self.tokenizer.mask_id, rng=rng)
        # A dual pair is two sequences. Drawn last: the numbers before do not depend on whether these are wanted.
        noise = rng.random((2 if kind == "dual" else 1, self.noise), dtype=np.float32)
        return _Sample(key, raw.image, image_mask, codes, raw.ids, inputs, masked, noise)

    def _stack(self, samples: dict[str, list[_Sample]]) -> Batch:
        everything = [sample for kind in KINDS for sample in samples.get(kind, [])]
        pairs, texts = samples.get("pairs", []), samples.get("dual", []) + samples.get("texts", [])
        pictures = [sample for sample in everything if sample.image is not None]
        size, layout = self.transform.size if self.transform else 1, self.layout
        return make_batch(
            layout,
            images=_tensor([sample.image for sample in pictures], np.uint8, 3, size, size),
            image_masks=_tensor([sample.image_mask for sample in pictures], np.bool_, max(layout.patches - 1, 0)),
            pair_tokens=_tensor([sample.ids for sample in pairs], np.int64, layout.pair_len),
            pair_inputs=_tensor([sample.inputs for sample in pairs], np.int64, layout.pair_len),
            pair_masked=_tensor([sample.masked for sample in pairs], np.bool_, layout.pair_len),
            text_tokens=_tensor([sample.ids for sample in texts], np.int64, layout.text_len),
            text_inputs=_tensor([sample.inputs for sample in texts], np.int64, layout.text_len),
            text_masked=_tensor([sample.masked for sample in texts], np.bool_, layout.text_len),
            noise=self._noise(samples) if self.noise else None,
            image_codes=self._codes(pictures) if any(feed.codes for feed in self.feeds) else None,
            keys=tuple(sample.key for sample in everything),
        )

    def _codes(self, pictures: list[_Sample]) -> Tensor:
        """int64 [N, P]; zeros for a kind without stored codes."""
        none = np.zeros(self.grid**2, np.int64)
        return _tensor([none if p.codes is None else p.codes for p in pictures], np.int64, self.grid**2)

    def _noise(self, samples: dict[str, list[_Sample]]) -> Tensor:
        """float32 [sequences, numbers], in the order of the layout: images, pairs, texts."""
        dual = samples.get("dual", [])
        images = [sample.noise[0] for sample in samples.get("images", []) + dual]
        pairs = [sample.noise[0] for sample in samples.get("pairs", [])]
        texts = [sample.noise[-1] for sample in dual + samples.get("texts", [])]
        return _tensor(images + pairs + texts, np.float32, self.noise)


def _tensor(rows: list, dtype, *shape: int) -> Tensor:
    """[rows, *shape], also of no rows."""
    return torch.from_numpy(np.stack(rows) if rows else np.zeros((0, *shape), dtype=dtype))
