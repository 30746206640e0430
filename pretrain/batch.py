"""What flows through the system: a `Layout` (how many sequences of which kind), a `Batch` (their contents), and `Kinds`
(one tensor per kind of sequence: what an encoder returns).

Row order of every packed activation `x_TD`, top to bottom:

    image-only patches | pair patches | pair text | text-only

so the vision expert's rows are a prefix, the language expert's a suffix, and the fusion expert's the middle. The first
row of an image is its class row, the first of a text is BOS (a text ends with EOS): they stand for the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.rows import Index, by_expert, make_index, sent
from pretrain.settings import near

# Ids as XLM-R and BEiT-3's `beit3.spm` are used: see transformers.XLMRobertaTokenizer.
BOS, PAD, EOS, UNK = 0, 1, 2, 3
# Text positions that carry no target, and what cross-entropy ignores.
IGNORE = -100


@dataclass(frozen=True)
class Layout:
    """How many sequences of each kind a micro-batch holds, and how long each is. It decides the route: images only is
    the vision encoder, texts only the language encoder, pairs only the fusion encoder, images and texts the dual
    encoder, pairs with `causal` image-to-text generation, all three masked data modeling."""

    images: int = 0
    pairs: int = 0
    texts: int = 0
    patches: int = 0  # of one image: grid * grid, without its class row
    pair_len: int = 0  # rows of one pair's text
    text_len: int = 0  # rows of one text-only sequence
    causal: bool = False  # pair text sees the image and the text before it; the image does not see the text
    dual: int = 0  # the last `dual` images and the first `dual` texts are pairs seen apart, in the same order

    @property
    def image_len(self) -> int:
        """Rows of one image: its class row and its patches."""
        return self.patches + 1 if self.patches else 0

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(sequences, rows of each sequence) of every kind: image-only, pair image, pair text, text-only."""
        return (
            (self.images, self.image_len),
            (self.pairs, self.image_len),
            (self.pairs, self.pair_len),
            (self.texts, self.text_len),
        )

    @property
    def counts(self) -> tuple[int, ...]:
        """Rows of every kind, in the order of `shapes`."""
        return tuple(sequences * length for sequences, length in self.shapes)

    @property
    def image_rows(self) -> int:
        return self.images * self.image_len

    @property
    def pair_image_rows(self) -> int:
        return self.pairs * self.image_len

    @property
    def pair_text_rows(self) -> int:
        return self.pairs * self.pair_len

    @property
    def text_rows(self) -> int:
        return self.texts * self.text_len

    @property
    def rows(self) -> int:
        return sum(self.counts)

    @property
    def sequences(self) -> int:
        return self.images + self.pairs + self.texts

    @property
    def vision_rows(self) -> int:
        return self.image_rows + self.pair_image_rows

    @property
    def language_rows(self) -> int:
        return self.pair_text_rows + self.text_rows

    def split(self, *, fusion: bool) -> tuple[int, ...]:
        """Rows of (vision, language), or of (vision, fusion, language) in a block with a fusion expert."""
        return by_expert(self.counts, fusion)


class Kinds(NamedTuple):
    """One tensor per kind of sequence, [sequences, length, ...] each; a kind that a layout lacks has no sequences.

    An encoder returns Kinds of floats [n, length, width]; heads name the rows that they read by Kinds of booleans
    [n, length].
    """

    images: Tensor
    pair_images: Tensor
    pair_texts: Tensor
    texts: Tensor

    @classmethod
    def split(cls, rows: Tensor, layout: Layout) -> Kinds:
        """Packed rows [layout.rows, ...] -> Kinds of views into them."""
        # A split and no slices: its backward is one concatenation, and not a zero-filled tensor per slice.
        parts = zip(rows.split(list(layout.counts)), layout.shapes, strict=True)
        return cls(*(part.unflatten(0, shape) for part, shape in parts))

    @classmethod
    def rows_of(cls, layout: Layout, device: torch.device, *, first: bool = False) -> Kinds:
        """Kinds of booleans [n, length], all False, or with `first` True for the first row of each sequence."""
        kinds = cls(*(torch.zeros(shape, dtype=torch.bool, device=device) for shape in layout.shapes))
        for kind in kinds if first else ():
            kind[:, :1] = True
        return kinds

    def pack(self) -> Tensor:
        """[rows of all kinds, ...] in the order of a packed pass; the kinds must have one width."""
        return torch.cat([kind.flatten(0, 1) for kind in self])

    @property
    def first(self) -> Kinds:
        """The row that stands for its sequence, [n, ...] per kind: the class row, BOS, or what a tower pools."""
        return Kinds(*(kind[:, 0] if kind.shape[1] else kind.flatten(0, 1) for kind in self))


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. N = images + pairs, P = patches, L = pair_len or text_len.

    `*_tokens` are clean ids, `*_inputs` what the encoder reads (some ids replaced), `*_masked` where a target stands;
    without masking the inputs equal the tokens and nothing is masked. Image-only pictures come before pair pictures.
    """

    layout: Layout
    images: Tensor  # uint8 [N, 3, H, W] (normalised on the device), or float, already normalised
    image_masks: Tensor  # bool [N, P], True: hidden from the encoder and to be predicted
    pair_tokens: Tensor  # int64 [pairs, pair_len], PAD behind EOS
    pair_inputs: Tensor  # int64 [pairs, pair_len]
    pair_masked: Tensor  # bool [pairs, pair_len]
    text_tokens: Tensor  # int64 [texts, text_len]
    text_inputs: Tensor  # int64 [texts, text_len]
    text_masked: Tensor  # bool [texts, text_len]
    image_codes: Tensor | None = None  # int64 [N, P], the visual tokenizer's codes; made on the device
    # In a further pass: the places in the step's own batch of the pictures of its first n pairs, int64 [n]. A model
    # with `shares_pictures` reuses the rows that it computed from them in the first pass; see tasks/pretrain.py.
    again: Tensor | None = None
    looks: Tensor | None = None  # float64 [N, 7]: flips and jitter that the device has yet to do, see jitter.py
    # Uniform random numbers in [0, 1), float32 [sequences, n], by who asked for them (DROP_PATH, or an objective's
    # name): drawn by each sample's own generator, so that no number of ranks or micro-steps changes them.
    draws: dict[str, Tensor] = field(default_factory=dict)
    # What a source adds, by its own names: a tensor [samples that have it, ...], or a tuple of strings or lists.
    extra: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()  # "source/shard/key" of each sample: images, pairs, dual pairs, texts
    # Where its padding and its targets stand. dataclasses.replace drops it; with_tensors keeps it if no mask or text
    # changes.
    index: Index | None = field(default=None, init=False)
    _host: Batch | None = field(default=None, init=False)

    @property
    def on_host(self) -> Batch:
        """The copy on the host, without pictures, whose masks and lengths can be read without waiting for a device. The
        batch itself, if it had no index before it was moved to its device."""
        return self._host or self

    def indexed(self) -> Batch:
        """The batch with its index. A batch from the loader has one already; to make one for a batch on a GPU waits for
        the device, once."""
        if self.index is not None:
            return self
        device = self.images.device
        host = self if device.type == "cpu" else _fetched(self._without_pictures())
        index = make_index(self.layout.shapes, *host.keys_seen, host.hidden, self.layout.dual)
        if host is self:
            return self.with_index(index, None)
        return self.with_index(index.map(partial(sent, device=device)), host.with_index(index, None))

    @property
    def keys_seen(self) -> tuple[Tensor, Tensor]:
        """The words that attention may see, that is all but padding: bool [pairs, pair_len] and [texts, text_len]. In a
        text that is all padding every row is seen: the softmax over no key would be NaN."""
        texts = self.text_inputs != PAD
        return self.pair_inputs != PAD, texts | ~texts.any(-1, keepdim=True)

    @property
    def hidden(self) -> Kinds:
        """bool [n, length] per kind: where a target stands."""
        layout = self.layout
        masks = F.pad(self.image_masks, (1, 0)) if layout.patches else self.image_masks
        images, pair_images = masks.split([layout.images, layout.pairs])
        return Kinds(images, pair_images, self.pair_masked, self.text_masked)

    def _without_pictures(self) -> Batch:
        return replace(self, images=self.images[:0], image_codes=None, looks=None)

    def with_index(self, index: Index | None, host: Batch | None) -> Batch:
        """A copy with this index, and with `host` as its `on_host`."""
        made = replace(self)
        object.__setattr__(made, "index", index)
        object.__setattr__(made, "_host", host)
        return made

    @property
    def real_layout(self) -> Layout:
        """The layout without padding: its texts have the mean of the real lengths, which need not be a whole number.
        What grows linearly with rows is exact for it; attention, which grows with squares, is underestimated a
        little."""
        index = self.indexed().index
        assert index is not None
        pairs, texts = (sum(lengths) / max(len(lengths), 1) for lengths in index.lengths)
        return replace(self.layout, pair_len=cast(int, pairs), text_len=cast(int, texts))

    def real_rows(self) -> int:
        """How many of its rows are not padding."""
        return round(self.real_layout.rows)

    def with_pictures(self, images: Tensor) -> Batch:
        """A copy with these pictures, whose flips and jitter are done."""
        return replace(self, images=images, looks=None).with_index(self.index, self._host)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copy does not block. If it has an index, the host's masks stay as `on_host`."""
        moved = self._moved(lambda value: value.to(device, non_blocking=True))
        if self.index is None or self._host is not None or moved.images.device == self.images.device:
            return moved
        return moved.with_index(moved.index, self._without_pictures().with_index(self.index, None))

    def pin_memory(self) -> Batch:
        """For the data loader's pinning thread, so that the copy to the device runs beside the computation."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return self.map(change).with_index(self.index and self.index.map(change), self._host)

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `change` applied to each of its tensors, without the index."""
        return self.with_tensors({name: change(value) for name, value in self.tensors()})

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every tensor; those of `draws` and `extra` are called "draws/NAME" and "extra/NAME"."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                yield name, value
            elif isinstance(value, dict):
                yield from ((f"{name}/{key}", part) for key, part in value.items() if isinstance(part, Tensor))

    def every_tensor(self) -> list[Tensor]:
        """The tensors of the batch, and of its index if it has one."""
        return [*dict(self.tensors()).values(), *(() if self.index is None else self.index.tensors())]

    def with_tensors(self, tensors: dict[str, Tensor]) -> Batch:
        """A copy with these tensors, by the names that `tensors()` gives. It keeps the index if none of INDEXED is
        among them."""
        own = {name: value for name, value in tensors.items() if "/" not in name}
        for parent in ("draws", "extra"):
            named = {n.removeprefix(f"{parent}/"): v for n, v in tensors.items() if n.startswith(f"{parent}/")}
            own[parent] = {**getattr(self, parent), **named}
        made = replace(self, **own)
        return made.with_index(self.index, self._host) if tensors.keys().isdisjoint(INDEXED) else made


# The tensors from which an index is made.
INDEXED = ("image_masks", "pair_inputs", "pair_masked", "text_inputs", "text_masked")
DROP_PATH = "drop_path"  # the name of drop path's numbers in `Batch.draws`


def batch_problem(kind: str, count: int, ranks: int, accumulation: int) -> str:
    """Why `count` sequences of a kind cannot be divided into equal micro-batches for all data ranks; "" if they can."""
    parts = ranks * accumulation
    if count > 0 and count % parts == 0:
        return ""
    return (
        f"batch.{kind}={count} is not a multiple of data ranks * batch.accumulation={ranks} * {accumulation}={parts}; "
        f"use batch.{kind}={near(count, parts)}"
    )


def derived(batch: Batch, make: Callable[[Batch], Batch]) -> Batch:
    """`make(batch)`, a batch for a further pass, with an index that is made without waiting for the device: `make` is
    called with `batch.on_host` too, which has no pictures."""
    host = make(batch.on_host).indexed()
    if batch.on_host is batch:
        return host
    assert host.index is not None
    return make(batch).with_index(host.index.map(partial(sent, device=batch.images.device)), host)


def _fetched(batch: Batch) -> Batch:
    """The batch on the host, in one copy: one of each tensor would be a wait for the device each."""
    named = dict(batch.tensors())
    parts = [value.flatten().view(torch.uint8) for value in named.values()]
    came = zip(named.items(), torch.cat(parts).cpu().split([len(part) for part in parts]), strict=True)
    # A copy begins where its type may.
    return batch.with_tensors({name: part.clone().view(like.dtype).view(like.shape) for (name, like), part in came})


def make_batch(
    layout: Layout,
    *,
    images: Tensor | None = None,
    image_masks: Tensor | None = None,
    pair_tokens: Tensor | None = None,
    text_tokens: Tensor | None = None,
    **rest: Any,
) -> Batch:
    """A batch from its clean parts. Pictures and texts that are not given are empty, masks are all False, and inputs
    equal the tokens; `rest` are other fields of Batch."""
    count = layout.images + layout.pairs
    images = torch.zeros(count, 3, 1, 1, dtype=torch.uint8) if images is None else images
    no_text = torch.zeros(0, 0, dtype=torch.long, device=images.device)
    pair_tokens = no_text.new_zeros(0, layout.pair_len) if pair_tokens is None else pair_tokens
    text_tokens = no_text.new_zeros(0, layout.text_len) if text_tokens is None else text_tokens
    if image_masks is None:
        image_masks = torch.zeros(count, layout.patches, dtype=torch.bool, device=images.device)
    parts: dict[str, Any] = {
        "pair_inputs": pair_tokens,
        "pair_masked": torch.zeros_like(pair_tokens, dtype=torch.bool),
        "text_inputs": text_tokens,
        "text_masked": torch.zeros_like(text_tokens, dtype=torch.bool),
    }
    clean = {"images": images, "image_masks": image_masks, "pair_tokens": pair_tokens, "text_tokens": text_tokens}
    return Batch(layout, **clean, **(parts | rest))
