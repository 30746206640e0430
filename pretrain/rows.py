"""Rows of a packed pass by their places: which of them go through the blocks, and which of them carry a target.

The loader makes an `Index` of every batch, since it knows masks and lengths: on a GPU the same questions would wait for
the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# The number of a kind's text rows is rounded up, to a multiple of 1 / FILL_SHARE of all its rows with padding and of
# FILL_LEAST, so that a run has a few shapes and not a new one at each step.
FILL_SHARE, FILL_LEAST = 32, 8


class Counted(Protocol):
    """What knows how many rows each kind has: a `batch.Layout`, or `Rows`."""

    @property
    def counts(self) -> tuple[int, ...]: ...


class Rows(NamedTuple):
    """A selection of the rows of a packed pass, or of such a selection."""

    places: Tensor  # int64 [R], rising
    # The same places, of each kind. A compiled block reads the counts from these shapes, which may change from batch to
    # batch without compiling again; a plain number may not.
    by_kind: tuple[Tensor, ...]

    @classmethod
    def of(cls, places: Tensor, counts: Sequence[int]) -> Rows:
        """`counts`: of each kind, as Layout.counts."""
        return cls(places, places.split(list(counts)))

    @classmethod
    def where(cls, chosen: Tensor, among: Counted) -> Rows:
        """The rows for which `chosen`, bool [rows], is True. If that lies on a GPU, this waits for the device."""
        counts = torch.stack([kind.sum() for kind in chosen.split(list(among.counts))]).tolist()
        return cls.of(chosen.nonzero().squeeze(1), counts)

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(part.shape[0] for part in self.by_kind)

    def split(self, *, fusion: bool) -> tuple[int, ...]:
        """As `Layout.split`."""
        return by_expert(self.counts, fusion)

    def to(self, device: torch.device) -> Rows:
        return Rows.of(sent(self.places, device), self.counts)


def by_expert(counts: tuple[int, ...], fusion: bool) -> tuple[int, ...]:
    """Rows of (vision, language), or of (vision, fusion, language), from those of every kind."""
    images, pair_images, pair_texts, texts = counts
    return (images, pair_images + pair_texts, texts) if fusion else (images + pair_images, pair_texts + texts)


def sent(value: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. A copy from the host to a GPU goes through pinned memory and does not block."""
    if value.device == device:
        return value
    pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=True)


def take(rows: Tensor, places: Tensor) -> Tensor:
    """[T, ...] -> [R, ...]: the rows at `places` int64 [R], all different."""
    return _Take.apply(rows, places)


class _Take(torch.autograd.Function):
    """index_select with a cheaper backward pass. torch's own adds gradients up, with atomics on a GPU, in case two
    places are equal; here no two are, so that a copy will do."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.length = len(rows)
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return put_at(grads[0], places=places, length=ctx.length), None


def put_at(rows: Tensor, *, places: Tensor, length: int) -> Tensor:
    """[R, ...] -> [length, ...]: the rows at `places` int64 [R], and zeros elsewhere."""
    return rows.new_zeros(length, *rows.shape[1:]).index_copy(0, places, rows)


class Index(NamedTuple):
    """Where a batch's padding and targets stand, known without asking the device. Places count the layout's rows,
    unless another count is named.

    `real` leaves out padding, except for a few rows that round up its shapes; pictures have no padding. `joined` and
    `starts` are the arguments of variable-length attention: the pair and text rows without any padding, sequence after
    sequence. `hidden` are the rows with a target, in six groups: images, dual images, pair images, pair texts, dual
    texts, texts.
    """

    real: Rows | None  # the rows that go through the blocks; None: all
    joined: Tensor  # int64 [J]: places among the rows of `real` that follow the image-only ones
    starts: Tensor  # int32 [pairs + texts + 1]: where each sequence begins in `joined`, and at the end J
    hidden: Tensor  # int64 [M], rising
    hidden_counts: tuple[int, ...]  # how many of them each group has
    lengths: tuple[tuple[int, ...], tuple[int, ...]]  # of each pair's text and of each text, without padding
    padded: tuple[bool, bool]  # whether any pair's text, and whether any text alone, has padding

    def tensors(self) -> list[Tensor]:
        """All its tensors; the kinds of `real` are views of one."""
        return [self.joined, self.starts, self.hidden, *([] if self.real is None else [self.real.places])]

    def map(self, change: Callable[[Tensor], Tensor]) -> Index:
        """The index with `change` applied to each of its tensors."""
        real = self.real and Rows.of(change(self.real.places), self.real.counts)
        own = {name: change(getattr(self, name)) for name in ("joined", "starts", "hidden")}
        return self._replace(real=real, **own)


def make_index(
    shapes: Sequence[tuple[int, int]], pair_keys: Tensor, text_keys: Tensor, hidden: Sequence[Tensor], dual: int
) -> Index:
    """The index of a batch whose layout has `shapes` and `dual`. `pair_keys` and `text_keys`: bool [pairs, pair_len]
    and [texts, text_len], False at padding; `hidden`: bool [n, length] per kind, True at a target."""
    keys = [torch.ones(shape, dtype=torch.bool, device=text_keys.device) for shape in shapes[:2]]
    keys += [pair_keys, text_keys]
    whole, kept = [n * length for n, length in shapes], [_filled(kind.flatten()) for kind in keys]
    counts = tuple(int(kind.sum()) if length else 0 for kind, (_, length) in zip(kept, shapes, strict=True))
    real = None if list(counts) == whole else Rows.of(torch.cat(kept).nonzero().squeeze(1), counts)
    joined, starts = _joined(torch.cat(kept), keys, shapes)
    groups = [
        *hidden[0].split([len(hidden[0]) - dual, dual]),
        *hidden[1:3],
        *hidden[3].split([dual, shapes[3][0] - dual]),
    ]
    hidden_counts = tuple(torch.stack([group.sum() for group in groups]).tolist())
    places = torch.cat([kind.flatten() for kind in hidden]).nonzero().squeeze(1)
    lengths = tuple(pair_keys.sum(1).tolist()), tuple(text_keys.sum(1).tolist())
    padded = not bool(pair_keys.all()), not bool(text_keys.all())
    return Index(real, joined, starts, places, hidden_counts, lengths, padded)


def _filled(keys: Tensor) -> Tensor:
    """bool [n] -> the same with the first few rows of padding True as well, as many as round up the count."""
    step = max(FILL_LEAST, -(-len(keys) // FILL_SHARE // FILL_LEAST) * FILL_LEAST)
    more = -int(keys.sum()) % step
    return keys | (~keys & ((~keys).cumsum(0) <= more))


def _joined(kept: Tensor, keys: list[Tensor], shapes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Index.joined and Index.starts. `kept` bool [rows]: the rows of Index.real; `keys`: per kind, no padding."""
    (images, image_len), (pairs, _), (_, pair_len), (texts, text_len) = shapes
    place = kept.cumsum(0)[images * image_len :] - 1 - images * image_len
    of_images, of_pairs, of_texts = place.split([pairs * image_len, pairs * pair_len, texts * text_len])
    both = torch.cat([of_images.view(pairs, image_len), of_pairs.view(pairs, pair_len)], 1)
    seen = F.pad(keys[2], (image_len, 0), value=True)
    rows = torch.cat([both[seen], of_texts.view(texts, text_len)[keys[3]]])
    starts = F.pad(torch.cat([seen.sum(1), keys[3].sum(1)]).cumsum(0), (1, 0)).to(torch.int32)
    return rows, starts
