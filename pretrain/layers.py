"""The layers that a model names by their role, for one device. Tensor parallelism supplies others behind the same calls
(pretrain/parallel/tensor.py), with the same parameter names and the same initial numbers.

Each layer draws its own weights: under zero.Init a parent module can no longer touch them.
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

# The standard deviation of a head's weights, drawn from a normal distribution without a cut, as BEiT's fine-tuning
# heads and VLMo's. BEiT's own pretraining head is cut at one standard deviation like its other weights, so its actual
# deviation is 0.54 of this.
HEAD_STD = 0.02


# Tensor cores want matrices whose sides are multiples of 8 or more, and 64010 is a multiple of 2 only. So a vocabulary
# is padded with unused rows to a multiple of MULTIPLE, which tensor ranks can divide too; one smaller than SMALL would
# gain little and stays as it is. The padding exists in memory alone: files hold the real rows (parallel/state.py,
# parallel/moments.py).
MULTIPLE, SMALL = 128, 4096


def padded(classes: int) -> int:
    """How many rows a vocabulary of `classes` has in memory."""
    return classes if classes < SMALL else -(-classes // MULTIPLE) * MULTIPLE


def mark_padded(parameter: nn.Parameter, classes: int) -> nn.Parameter:
    """Sets `real_rows`, by which the code that reads and writes files knows how many rows of the whole parameter are
    real. The others are zero and stay zero, since their gradients are zero."""
    marked: Any = parameter
    marked.real_rows = classes
    return parameter


class Linear(nn.Linear):
    """A linear layer whose weights start as `draw` says, with this `std` and `cut`."""

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
    """A linear head over a vocabulary, and its cross-entropy. Its classes are padded (see `padded`), and padding has
    probability 0. A `tied` head has no weight of its own: whoever builds it sets `weight` to the embedding table that
    it shares."""

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
        """rows [R, inputs], targets int64 [R], fp32 `weights` [R] of the rows' losses; `smoothing` and the result are
        those of cross_entropy.linear_cross_entropy. The logits of all rows are never held at once."""
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
    """The part of a packed pass that this rank computes."""

    own: Rows | None  # the rows that go through the blocks; None: all
    read: Rows | None  # those of them that come out of the last block, for heads to read; None: all
    # [rows at the end, D] -> [all rows of the pass, D]: every rank's rows at their places, zeros elsewhere
    join: Callable[[Tensor], Tensor]


def whole_pass(batch: Batch, needed: Tensor | None) -> Share:
    """All rows but padding, for a batch with an index. `needed`: the rows that heads read, bool [layout.rows], or None
    for all."""
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
    # (values [..., heads], the same on every rank) -> the values of this rank's heads
    own_heads: Callable[[Tensor], Tensor] = lambda values: values
    # (a batch with an index; the rows that heads read, bool [layout.rows], or None) -> this rank's share of the pass
    share: Callable[[Batch, Tensor | None], Share] = whole_pass
    # Turns attention over whole sequences, (queries, keys, values [rows, heads, C], layout, ...) -> [rows, heads, C],
    # into attention that takes and returns the rows of this rank's share.
    attention: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda attend: attend
    # (rows [n, ...]) -> (all data ranks' rows, the place of the first own row among them)
    gather: Callable[[Tensor], tuple[Tensor, int]] = gather_own
    # (rows [n, ...], a function that is shown each data rank's rows) -> the gradient that all of them return for this
    # rank's rows; see distributed.visit_ranks
    visit: Callable[[Tensor, Callable[[Tensor, int], Tensor | None]], Tensor | None] = visit_ranks
    # A context in which parameters are created whole on every rank, until the engine splits them: for modules that draw
    # their weights only when all of them exist.
    whole: Callable[[], AbstractContextManager[None]] = nullcontext
    # (parameters) -> a context in which every rank has them whole, to read them
    gathered: Callable[[Sequence[Any]], AbstractContextManager[Any]] = lambda parameters: nullcontext()


PLAIN = Layers()


@torch.no_grad()
def draw(weight: Tensor, std: float, cut: float = 1.0) -> Tensor:
    """Fills `weight` from a normal distribution of standard deviation `std` that is cut at `cut` * `std` (math.inf: not
    at all). A cut lowers the actual deviation: at 1, as BEiT and the released BEiT-3 draw, it is 0.54 `std`; at 2,
    0.88.

    The numbers are drawn in fp32 on the host, whatever device and type zero.Init gives the weight, so that one seed
    gives one model."""
    if weight.is_meta:
        return weight
    # Not torch.empty: zero.Init replaces it.
    drawn = torch.empty_like(weight, dtype=torch.float32, device="cpu")
    if math.isinf(cut):
        return weight.copy_(drawn.normal_(std=std))
    return weight.copy_(nn.init.trunc_normal_(drawn, std=std, a=-cut * std, b=cut * std))


def draw_first(weight: Tensor, rows: int, draw_rows: Callable[[Tensor], Any]) -> Tensor:
    """Draws the first `rows` of a weight, with the numbers that they would get without padding; the others are zero."""
    with torch.no_grad():
        draw_rows(weight[:rows])
        weight[rows:].zero_()
    return weight


def draw_head(weight: Tensor) -> Tensor:
    """A head's weights, cut at timm's bounds -2 and 2, 100 standard deviations away."""
    return draw(weight, HEAD_STD, cut=2.0 / HEAD_STD)


def normal(*shape: int, std: float, cut: float = 1.0) -> nn.Parameter:
    """A parameter drawn as `draw` does."""
    return nn.Parameter(draw(torch.empty(*shape), std, cut))
