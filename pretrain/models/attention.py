"""Attention inside each sequence of a packed pass, grouped by kind of sequence: the only file that calls its kernels.

The rows come without padding, except for the few that round up a shape (pretrain/rows.py). Images go through torch's
scaled_dot_product_attention without a mask (flash on CUDA, no copies). On CUDA in bf16 and fp16, pairs and texts go
through one variable-length call; elsewhere their texts are spread over rows with padding, which a mask hides. The two
ways differ in what they return for rows of padding, which no other row and no head reads.

Shapes: T rows, H heads, C width of a head, N sequences, L rows of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import Batch, Layout
from pretrain.rows import Rows, put_at, take


class Packing(NamedTuple):
    """The pair and text rows without padding, sequence after sequence."""

    joined: Tensor  # int64 [J]: their places among the rows behind the image-only ones
    starts: Tensor  # int32 [pairs + texts + 1]: where each sequence begins among them, and at the end J
    longest: int  # an upper bound of the sequences' lengths


class Padding(NamedTuple):
    """What attention must know about padding: `packing` for the variable-length kernel, or the four tensors below it
    for the other one."""

    rows: Rows | None = None  # the rows of the pass that attention gets; None: all
    packing: Packing | None = None
    pair_keys: Tensor | None = None  # bool [pairs, pair_len]: the words of pairs that may be seen; None: all
    text_keys: Tensor | None = None  # bool [texts, text_len], likewise
    pair_places: Tensor | None = None  # int64: where the pair text rows that are there stand among all; None: all are
    text_places: Tensor | None = None  # likewise of text-only rows


class Bias(NamedTuple):
    """What is added to the attention scores of each kind of sequence, float [heads, length, length]."""

    images: Tensor | None = None
    pairs: Tensor | None = None
    texts: Tensor | None = None


NO_PADDING, NO_BIAS = Padding(), Bias()


def padding_of(batch: Batch, *, packed: bool = False) -> Padding:
    """The Padding of a batch with an index; `packed` for the variable-length kernel."""
    index, layout = batch.index, batch.layout
    assert index is not None
    if packed:
        longest = max(layout.image_len + layout.pair_len if layout.pairs else 0, layout.text_len)
        return Padding(index.real, Packing(index.joined, index.starts, longest))
    counts = layout.counts if index.real is None else index.real.counts
    pairs, texts = (real != whole for real, whole in zip(counts[2:], layout.counts[2:], strict=True))
    pair_keys, text_keys = (keys if some else None for keys, some in zip(batch.keys_seen, index.padded, strict=True))
    if index.real is None:
        return Padding(None, None, pair_keys, text_keys)
    _, of_pairs, of_texts = index.real.places.split([layout.vision_rows, *counts[2:]])
    return Padding(
        index.real,
        pair_keys=pair_keys,
        text_keys=text_keys,
        pair_places=of_pairs - layout.vision_rows if pairs else None,
        text_places=of_texts - layout.vision_rows - layout.pair_text_rows if texts else None,
    )


def can_pack(x_TD: Tensor, layout: Layout, head_dim: int) -> bool:
    """Whether the variable-length kernel takes these rows: a GPU from Ampere on, half precision, no causal mask."""
    return (
        x_TD.is_cuda
        and x_TD.dtype in (torch.bfloat16, torch.float16)
        and layout.language_rows > 0
        and not layout.causal
        and head_dim % 8 == 0
        and head_dim <= 256
        and torch.cuda.get_device_capability(x_TD.device) >= (8, 0)
        and _varlen_kernel() is not None
    )


def attend(
    q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, layout: Layout, padding: Padding = NO_PADDING, bias: Bias = NO_BIAS
) -> Tensor:
    """Scaled dot-product attention inside every sequence: [T, H, C] each, for the T rows of `padding.rows`, -> [T, H,
    C]. A pair is one sequence, its image rows and then its text rows; with `layout.causal` a word of it sees the image
    and the words up to itself, and the image only itself (BEiT-3's captioning: unilm beit3/modeling_finetune.py)."""
    counts = list(layout.counts if padding.rows is None else padding.rows.counts)
    if padding.packing is not None:
        counts = [counts[0], sum(counts[1:])]
    # A split and no slices: its backward is one concatenation, and not a zero-filled tensor per slice.
    kinds: Any = zip(*(x.split(counts) for x in (q_THC, k_THC, v_THC)), strict=True)
    images, *others = kinds
    # A kind without sequences is left out: attention has no parameters that would miss a gradient.
    parts = [_sdpa(*_each(images, layout.images), None, bias.images).flatten(0, 1)] if layout.images else []
    if padding.packing is not None:
        parts.append(_attend_packed(others[0], padding.packing))
    else:
        parts += _attend_grouped(others, layout, padding, bias)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


QKV = tuple[Tensor, Tensor, Tensor]


def _each(qkv: QKV, sequences: int) -> QKV:
    """[n * L, H, C] -> [n, L, H, C], for queries, keys and values."""
    q, k, v = (x.unflatten(0, (sequences, -1)) for x in qkv)
    return q, k, v


def _spread(qkv: QKV, places: Tensor | None, shape: tuple[int, int]) -> QKV:
    """[rows, H, C] -> [n, L, H, C]; `places` as Padding's. Padding that was left out comes back as zeros."""
    n, length = shape
    if places is not None:
        q, k, v = (put_at(x, places=places, length=n * length) for x in qkv)
        qkv = q, k, v
    return _each(qkv, n)


def _gathered(rows: Tensor, places: Tensor | None) -> Tensor:
    """The reverse of `_spread`, for rows [n * L, H, C]."""
    return rows if places is None else take(rows, places)


def _attend_grouped(others: list[QKV], layout: Layout, padding: Padding, bias: Bias) -> list[Tensor]:
    """-> [pair image rows, pair text rows, text-only rows], without the kinds that the layout lacks."""
    (pair_images, pair_texts, texts), parts = others, []
    if layout.pairs:
        pairs = _each(pair_images, layout.pairs), _spread(pair_texts, padding.pair_places, layout.shapes[2])
        attend_pairs = _attend_causally if layout.causal else _attend_joined
        image_out, text_out = attend_pairs(*pairs, padding.pair_keys, bias.pairs)
        parts += [image_out, _gathered(text_out, padding.pair_places)]
    if layout.texts:
        out = _sdpa(*_spread(texts, padding.text_places, layout.shapes[3]), padding.text_keys, bias.texts)
        parts.append(_gathered(out.flatten(0, 1), padding.text_places))
    return parts


def _attend_joined(images: QKV, texts: QKV, text_keys: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """Pairs in which every row sees every other -> [image rows, text rows]."""
    q, k, v = (torch.cat(both, 1) for both in zip(images, texts, strict=True))
    lengths = [images[0].shape[1], texts[0].shape[1]]
    out = _sdpa(q, k, v, _with_image(text_keys, lengths[0]), bias)
    return [part.flatten(0, 1) for part in out.split(lengths, 1)]


def _attend_causally(images: QKV, texts: QKV, text_keys: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """Pairs of a layout with `causal` -> [image rows, text rows]."""
    image_len, length = images[0].shape[1], texts[0].shape[1]
    k, v = (torch.cat(both, 1) for both in zip(images[1:], texts[1:], strict=True))
    before = torch.ones(length, image_len + length, dtype=torch.bool, device=k.device).tril(image_len)
    image_bias = None if bias is None else bias[:, :image_len, :image_len]
    text_bias = None if bias is None else bias[:, image_len:]
    image_out = _sdpa(*images, None, image_bias)
    text_out = _sdpa(texts[0], k, v, _with_image(text_keys, image_len), text_bias, before)
    return [image_out.flatten(0, 1), text_out.flatten(0, 1)]


def attend_behind(q_NLHC: Tensor, k_NSHC: Tensor, v_NSHC: Tensor, bias: Tensor | None = None) -> Tensor:
    """Causal attention of a text's last L rows: queries of these rows, keys and values of all S rows from the picture's
    first on -> [N, L, H, C]. Each row sees itself and all rows before it. `bias` float [H, L, S]."""
    length, before = q_NLHC.shape[1], k_NSHC.shape[1] - q_NLHC.shape[1]
    seen = None
    if length > 1:
        seen = torch.ones(length, before + length, dtype=torch.bool, device=q_NLHC.device).tril(before)
    return _sdpa(q_NLHC, k_NSHC, v_NSHC, None, bias, seen)


def attend_whole(q_NLHC: Tensor, k_NLHC: Tensor, v_NLHC: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention without a mask, [N, L, H, C] each -> [N, L, H, C]. `bias` float [H, L, L]."""
    return _sdpa(q_NLHC, k_NLHC, v_NLHC, None, bias)


def _with_image(text_keys: Tensor | None, image_len: int) -> Tensor | None:
    """The keys of a pair that may be seen: all of its image's, then the text's."""
    return None if text_keys is None else F.pad(text_keys, (image_len, 0), value=True)


def _sdpa(
    q_NLHC: Tensor,
    k_NLHC: Tensor,
    v_NLHC: Tensor,
    keys: Tensor | None,
    bias: Tensor | None,
    before: Tensor | None = None,
) -> Tensor:
    """-> [N, L, H, C]. `keys` bool [N, S]: the keys that may be seen; `before` bool [L, S]: those that each query may
    see; None: all. `bias` float [H, L, S]."""
    options: dict[str, Any] = {}
    if bias is not None:
        assert len(bias) == q_NLHC.shape[2], (bias.shape, q_NLHC.shape)
        seen = bias.to(q_NLHC.dtype)
        seen = (seen if before is None else torch.where(before, seen, -torch.inf)).unsqueeze(0)
        if keys is not None:
            options["scale"] = q_NLHC.shape[-1] ** -0.5  # of the head's own width: `_hide` makes queries wider
            q_NLHC, k_NLHC = _hide(q_NLHC, k_NLHC, keys)
    else:
        seen = keys if keys is None else keys[:, None, None, :]
        seen = before if seen is None else seen if before is None else before & seen
    q, k, v = (x.transpose(1, 2) for x in (q_NLHC, k_NLHC, v_NLHC))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, **options).transpose(1, 2)


# HIDDEN times the attention's scale is added to the score of a key that may not be seen. It fits into fp16, and exp of
# it is 0. WIDER: by how much a head grows for it.
HIDDEN, WIDER = -30_000.0, 8


def _hide(q_NLHC: Tensor, k_NLHC: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Hides keys without a mask: queries and keys grow by WIDER numbers (kernels want a multiple of 8) whose product is
    HIDDEN for a key that may not be seen and 0 for the others. A mask added to a learned bias would be a tensor [N, H,
    L, L], and its gradient another."""
    n, queries, heads, _ = q_NLHC.shape
    one = q_NLHC.new_ones(1).expand(n, queries, heads, 1)
    hidden = k_NLHC.new_zeros(keys.shape).masked_fill_(~keys, HIDDEN)[:, :, None, None].expand(-1, -1, heads, -1)
    q, k = (torch.cat([x, F.pad(more, (0, WIDER - 1))], -1) for x, more in ((q_NLHC, one), (k_NLHC, hidden)))
    return q, k


def _attend_packed(qkv: QKV, packing: Packing) -> Tensor:
    """The pair and text rows through the variable-length kernel; rows of padding come out as zero."""
    q, k, v = (take(x, packing.joined) for x in qkv)
    kernel = _varlen_kernel()
    assert kernel is not None
    attended = kernel(q, k, v, packing.starts, packing.starts, packing.longest, packing.longest)
    return put_at(attended, places=packing.joined, length=len(qkv[0]))


@cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """torch's (from 2.10 on), else flash-attn's, else None; called as (q, k, v, starts, starts, longest, longest)."""
    try:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_varlen_func

        return flash_attn_varlen_func
    except ImportError:
        return None
