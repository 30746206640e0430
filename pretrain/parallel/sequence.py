"""Sequence parallelism (DeepSpeed-Ulysses, arXiv 2309.14509): each rank carries its share of a packed pass's rows.

Every rank of the group sees the same micro-batch, embeds it, and takes its share: of each kind of rows a run of equal
length, to one row, so that all ranks have the same work in every expert. Norms, projections and experts see these rows
only. For attention the ranks exchange their rows of all heads for all rows of their heads, and back. At the end the
rows that heads read are gathered on every rank, and each computes the whole loss.

So a rank holds 1/size of the blocks' activations, and all of the embedding's and the heads'. Its gradients are those of
the sum of all ranks' losses, through the part of the work that this rank did; averaged over the group, as DeepSpeed
does by ModelParallelUnit, they are the gradients of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.batch import Batch, Layout
from pretrain.layers import Layers, Share
from pretrain.parallel.mesh import Axis
from pretrain.rows import Counted, Rows, put_at, sent

Attend = Callable[..., Tensor]


def over_rows(layers: Layers, sequence: Axis) -> Layers:
    """`layers` for a model that carries a share of the rows."""
    return layers._replace(
        share=partial(share_pass, sequence=sequence),
        attention=lambda attend: partial(attend_by_heads, attend, sequence=sequence),
        # A share of this tensor rank's heads. The gradient is zero for the other heads; the average over the sequence
        # ranks has every head's, as it has every row's.
        own_heads=lambda values: layers.own_heads(values).chunk(sequence.size, -1)[sequence.rank],
    )


class Cut(NamedTuple):
    """How the rows of a packed pass are divided among the ranks of a group."""

    own: Rows  # this rank's
    sizes: list[int]  # how many rows each rank has
    by_rank: Tensor  # int64 [rows]: the rows' places in the pass, in the order of ranks
    back: Tensor  # int64 [rows]: the inverse permutation, where each row of the pass stands in that order

    @classmethod
    def of(cls, rows: Counted, sequence: Axis, device: torch.device) -> Cut:
        """Of the pass over `rows`, with its tensors on `device`."""
        return _cut(rows.counts, sequence.rank, sequence.size, device)


@lru_cache(maxsize=16)  # every block of a step needs the same ones
def _cut(counts: tuple[int, ...], rank: int, ranks: int, device: torch.device) -> Cut:
    kinds = torch.arange(sum(counts)).split(list(counts))
    # tensor_split would give the remainders of every kind to the first ranks.
    shares = [[kind[r * len(kind) // ranks : (r + 1) * len(kind) // ranks] for kind in kinds] for r in range(ranks)]
    with torch.inference_mode(False):  # tensors that an evaluation puts into the cache must serve training too
        by_rank = torch.cat([run for share in shares for run in share])
        own = Rows.of(torch.cat(shares[rank]), [len(run) for run in shares[rank]]).to(device)
        back = by_rank.argsort()
    return Cut(own, [sum(map(len, share)) for share in shares], sent(by_rank, device), sent(back, device))


def share_pass(batch: Batch, needed: Tensor | None, *, sequence: Axis) -> Share:
    """See `Layers.share`: the rows without padding are divided among the ranks."""
    index, layout = batch.on_host.index, batch.layout
    assert index is not None
    device, host = batch.images.device, batch.on_host.images.device
    cut = Cut.of(index.real or layout, sequence, host)
    places = cut.by_rank if index.real is None else index.real.places[cut.by_rank]  # of each rank's rows, in the pass
    mine = places.split(cut.sizes)[sequence.rank]
    own = Rows.of(sent(mine, device), cut.own.counts)
    join = partial(_join, length=layout.rows, axis=sequence)
    if needed is None:
        return Share(own, None, partial(join, places=sent(places, device), sizes=cut.sizes))
    needed = needed.to(host)
    by_rank = needed[places]
    sizes = torch.stack([part.sum() for part in by_rank.split(cut.sizes)]).tolist()
    join = partial(join, places=sent(places[by_rank], device), sizes=sizes)
    return Share(own, Rows.where(needed[mine], cut.own).to(device), join)


def _join(rows: Tensor, *, places: Tensor, sizes: list[int], length: int, axis: Axis) -> Tensor:
    """[own rows, D] -> [length, D]: the rows of all ranks, `sizes` of each, at their `places`."""
    assert len(rows) == sizes[axis.rank], (rows.shape, sizes)
    # Every rank gets the same rows. In the backward pass the gradients of all ranks' losses are summed.
    copies = rows.repeat(axis.size, 1)
    return put_at(_Exchange.apply(copies, [len(rows)] * axis.size, sizes, axis), places=places, length=length)


def attend_by_heads(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, layout: Layout, padding: Any = None, *more: Any, sequence: Axis
) -> Tensor:
    """`attend` for this rank's rows, [own rows, H, C] each -> [own rows, H, C]: it is called on all rows of H / size
    heads. `padding.rows`: all ranks' rows together; None: all of the pass."""
    assert q.shape[1] % sequence.size == 0, (q.shape, sequence.size)
    cut = Cut.of(getattr(padding, "rows", None) or layout, sequence, q.device)
    own = [len(q)] * sequence.size
    # [ranks, own rows, heads, 3, C]: the heads of each rank, in one message.
    by_heads = torch.stack([x.unflatten(1, (sequence.size, -1)).transpose(0, 1) for x in (q, k, v)], 3)
    arrived = _Exchange.apply(by_heads.flatten(0, 1), own, cut.sizes, sequence)
    q, k, v = _Reorder.apply(arrived, cut.back, cut.by_rank).unbind(2)
    given = more if padding is None else (padding, *more)
    y_THC = _Reorder.apply(attend(q, k, v, layout, *given), cut.by_rank, cut.back)
    return (
        _Exchange.apply(y_THC, cut.sizes, own, sequence).unflatten(0, (sequence.size, -1)).transpose(0, 1).flatten(1, 2)
    )


class _Exchange(torch.autograd.Function):
    """All-to-all: sends the next sent[r] of the rows to each rank r, and receives received[r] rows from it; the
    backward pass sends gradients the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
        ctx.route = received, sent, axis
        return _exchange(rows, sent, received, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], *ctx.route), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], axis: Axis) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=axis.group)
    return arrived


class _Reorder(torch.autograd.Function):
    """Rows in the order `places`, a permutation with the inverse `back`, by which the backward pass is a copy; autograd
    alone would add gradients up into zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.back), None, None
