"""The layers that a model names by their role, for one device. Tensor parallelism supplies others behind the same calls
(pretrain/parallel/tensor.py), with the same names and the same initial numbers.

Each draws its own weights: under zero.Init a parent can no longer touch them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.cross_entropy import Scored, linear_cross_entropy
from pretrain.distributed import gather_own, visit_ranks
from pretrain.rows import Rows, put_at, sent

# Of a head's weights, from a normal distribution that is not cut: as BEiT's fine-tuning heads and VLMo's. BEiT's own
# pretraining head is cut at one standard deviation like the rest of its weights, so it starts with 0.54 of this.
HEAD_STD = 0.02


# Tensor cores want matrices whose sides are multiples of 8 and more, and 64010 is one of 2; so a vocabulary gets rows
# that stand for nothing: a multiple of MULTIPLE, which tensor ranks can divide too. One of less than SMALL gains little
# and stays as it is. Only a run's memory has them: files hold the real rows (parallel/state.py, parallel/moments.py).
MULTIPLE, SMALL = 128, 4096


def padded(classes: int) -> int:
    """The rows of a vocabulary of so many classes."""
    return classes if classes < SMALL else -(-classes // MULTIPLE) * MULTIPLE


def mark_padded(parameter: nn.Parameter, classes: int) -> nn.Parameter:
    """`real_rows` tells those who read and write files how many rows of the whole parameter are real; the others are
    zero and stay zero, since their gradients are."""
    marked: Any = parameter
    marked.real_rows = classes
    return parameter


class Linear(nn.Linear):
    """A linear layer whose weights start with a standard deviation of its own."""

    def __init__(self, inputs: int, outputs: int, *, std: float = 0.02, bias: bool = True, cut: float = 1.0):
        self.std, self.cut = std, cut  # see `draw`
        super().__init__(inputs, outputs, bias=bias)

    def reset_parameters(self) -> None:
        draw(self.weight, self.std, self.cut)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Vocabulary(nn.Embedding):
    """An embedding whose rows are padded; see `padded`."""

    def __init__(self, size: int, dim: int, *, std: float = 0.02):
        self.std, self.size = std, size
        super().__init__(padded(size), dim)
        mark_padded(self.weight, size)

    def reset_parameters(self) -> None:
        draw_first(self.weight, self.size, partial(draw, std=self.std))


class Head(nn.Linear):
    """A linear layer without an activation behind it; every rank of a tensor group has all of it."""

    def reset_parameters(self) -> None:
        draw_head(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Classifier(nn.Module):
    """A linear head over a vocabulary, and its cross-entropy. Its classes are padded (see `padded`), and no padding has
    a probability. A `tied` one has no weight of its own: whoever builds it sets `weight` to the embedding table that it
    shares."""

    weight: nn.Parameter | None

    def __init__(self, inputs: int, classes: int, *, tied: bool = False):
        super().__init__()
        self.classes, rows = classes, padded(classes)
        self.register_parameter("weight", None)
        if not tied:
            drawn = draw_first(torch.empty(rows, inputs), classes, draw_head)
            self.weight = mark_padded(nn.Parameter(drawn), classes)
        self.bias = mark_padded(nn.Parameter(torch.zeros(rows)), classes)

    def forward(self, rows: Tensor, targets: Tensor, weights: Tensor, smoothing: float = 0.0) -> Scored:
        """rows [R, inputs], targets int64 [R], weights fp32 [R] of the rows' losses; `smoothing` and what
        comes out as for cross_entropy.linear_cross_entropy. All logits are never there at once."""
        assert self.weight is not None
        options: Any = {"classes": self.classes, "smoothing": smoothing}
        return linear_cross_entropy(rows, self.weight, self.bias, targets, weights, **options)

    def predict(self, rows: Tensor) -> Tensor:
        """[R, inputs] -> int64 [R]: the best class of each."""
        return self.logits(rows).argmax(-1)

    def logits(self, rows: Tensor) -> Tensor:
        """[..., inputs] -> [..., classes]"""
        return F.linear(rows, self.weight, self.bias)[..., : self.classes]


class Share(NamedTuple):
    """What of a packed pass this rank carries."""

    own: Rows | None  # these rows go through the blocks; None: all
    read: Rows | None  # these of them are carried to the end, where heads read them; None: all
    # [rows at the end, D] -> [all rows of the pass, D], those of every rank in their places and zeros where none is
    join: Callable[[Tensor], Tensor]


def whole_pass(batch: Batch, needed: Tensor | None) -> Share:
    """All rows but the padding."""
    index, host, layout = batch.index, batch.on_host, batch.layout
    assert index is not None and host.index is not None
    device, real = batch.images.device, host.index.real
    if needed is None:
        places = None if index.real is None else index.real.places
        return Share(index.real, None, partial(_join, places=places, length=layout.rows))
    needed = needed.to(host.images.device)
    read = Rows.where(needed if real is None else needed[real.places], real or layout)
    places = sent(read.places if real is None else real.places[read.places], device)
    return Share(index.real, read.to(device), partial(_join, places=places, length=layout.rows))


def _join(rows: Tensor, *, places: Tensor | None, length: int) -> Tensor:
    return rows if places is None else put_at(rows, places=places, length=length)


class Layers(NamedTuple):
    """What parallelism replaces in a model on one device."""

    column: Callable[..., nn.Module] = Linear  # (inputs, outputs, *, std, bias, cut): splits its outputs
    row: Callable[..., nn.Module] = Linear  # (inputs, outputs, *, std, bias, cut): splits its inputs, sums its outputs
    inner_norm: Callable[..., nn.Module] = nn.LayerNorm  # (dim, eps=): normalises a split dimension
    vocabulary: Callable[..., nn.Module] = Vocabulary  # (size, dim, *, std): splits its rows
    classifier: Callable[..., nn.Module] = Classifier  # (inputs, classes, *, tied): splits its classes
    # (values [..., heads] that every rank has) -> those of this rank's heads
    own_heads: Callable[[Tensor], Tensor] = lambda values: values
    # (a batch with an index; the rows that heads read, bool [layout.rows], or None) -> this rank's share of the pass
    share: Callable[[Batch, Tensor | None], Share] = whole_pass
    # attention of whole sequences, (queries, keys, values [rows, heads, C], layout, ...) -> the same of a share's rows
    attention: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda attend: attend
    # (rows [n, ...]) -> (all data ranks' rows, the place of the first own row among them)
    gather: Callable[[Tensor], tuple[Tensor, int]] = gather_own
    # (rows [n, ...], what sees each data rank's) -> what was said about the own ones; see distributed.visit_ranks
    visit: Callable[[Tensor, Callable[[Tensor, int], Tensor | None]], Tensor | None] = visit_ranks
    # What is made inside is whole on every rank until the engine splits it: for modules that draw their weights late.
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    # (parameters) -> a context in which every rank has them whole, to read them
    gathered: Callable[[Sequence[Any]], AbstractContextManager[Any]] = lambda parameters: nullcontext()


PLAIN = Layers()


@torch.no_grad()
def draw(weight: Tensor, std: float, cut: float = 1.0) -> Tensor:
    """From a normal distribution of this `std` that ends at `cut` times it; math.inf: nowhere. A cut makes weights
    smaller than `std` says: at 1, as BEiT and the released BEiT-3 draw, their standard deviation is 0.54 of it; at 2,
    0.88.

    In fp32 on the host, wherever and in what type zero.Init puts the weight: one seed, one model."""
    if weight.is_meta:
        return weight
    # Not torch.empty: zero.Init replaces it.
    drawn = torch.empty_like(weight, dtype=torch.float32, device="cpu")
    if math.isinf(cut):
        return weight.copy_(drawn.normal_(std=std))
    return weight.copy_(nn.init.trunc_normal_(drawn, std=std, a=-cut * std, b=cut * std))


def draw_first(weight: Tensor, rows: int, draw_rows: Callable[[Tensor], Any]) -> Tensor:
    """Draws the first `rows` of a weight, which get the numbers that they would get alone; the others are zero."""
    with torch.no_grad():
        draw_rows(weight[:rows])
        weight[rows:].zero_()
    return weight


def draw_head(weight: Tensor) -> Tensor:
    return draw(weight, HEAD_STD, cut=2.0 / HEAD_STD)  # timm's bounds, 100 standard deviations away


def normal(*shape: int, std: float, cut: float = 1.0) -> nn.Parameter:
    """A parameter drawn as `draw` does."""
    return nn.Parameter(draw(torch.empty(*shape), std, cut))
