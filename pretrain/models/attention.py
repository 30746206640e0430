"""The kernel door: attention inside each sequence of a packed pass, grouped by kind of sequence.

Images go through torch's scaled_dot_product_attention without a mask (flash on CUDA, no copies). Pairs and texts take
it with a mask where there is padding, or on CUDA in bf16 and fp16 one variable-length call that skips the padding.
What comes out for rows of padding differs between the two, and nothing reads it: no other row sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.batch import PAD, Batch, Layout


class Packing(NamedTuple):
    """The pair and text rows without padding, sequence after sequence."""

    rows: Tensor  # int64 [R]: their places in the packed pass
    starts: Tensor  # int32 [pairs + texts + 1]: where each sequence begins among these rows, and R
    longest: int  # an upper bound of the sequences' lengths


class Padding(NamedTuple):
    """Which text keys may be seen, bool [pairs, pair_len] and [texts, text_len], None: all; or the rows to pack."""

    pair_keys: Tensor | None = None
    text_keys: Tensor | None = None
    packing: Packing | None = None


class Bias(NamedTuple):
    """What is added to the attention scores of each kind of sequence, float [heads, length, length]."""

    images: Tensor | None = None
    pairs: Tensor | None = None
    texts: Tensor | None = None


NO_PADDING, NO_BIAS = Padding(), Bias()


def padding_of(batch: Batch, *, packed: bool = False) -> Padding:
    """The keys that are no padding; `packed` for the variable-length kernel. A text that is all padding sees itself:
    the softmax of nothing would be NaN."""
    texts = batch.text_inputs != PAD
    pairs, texts = batch.pair_inputs != PAD, texts | ~texts.any(-1, keepdim=True)
    if packed:
        return Padding(packing=_pack(batch.layout, pairs, texts))
    if texts.device.type == "cpu":  # elsewhere the question would wait for the device
        return Padding(*(None if bool(keys.all()) else keys for keys in (pairs, texts)))
    return Padding(pairs if pairs.numel() else None, texts if texts.numel() else None)


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
    """Scaled dot-product attention of every sequence with itself: [T, H, C] each (T `layout.rows`, H heads, C width of
    a head) -> [T, H, C]. A pair is its image rows and its text rows joined; with `layout.causal` its text sees the
    image and the text before it, and its image only itself (BEiT-3's captioning: unilm beit3/modeling_finetune.py)."""
    # A split and no slices: its backward is one concatenation, and not a zero-filled tensor per slice.
    kinds = zip(*(x.split(list(layout.counts)) for x in (q_THC, k_THC, v_THC)), strict=True)
    images, pair_images, pair_texts, texts = kinds
    parts: list[Tensor] = []
    # A kind without sequences is left out: attention has no parameters that would miss a gradient.
    if layout.images:
        parts.append(_sdpa(*_each(images, layout.images), None, bias.images).flatten(0, 1))
    if padding.packing is not None:
        parts.append(_attend_packed(q_THC, k_THC, v_THC, layout, padding.packing))
    else:
        if layout.pairs:
            pairs = _each(pair_images, layout.pairs), _each(pair_texts, layout.pairs)
            attend_pairs = _attend_causally if layout.causal else _attend_joined
            parts += attend_pairs(*pairs, padding.pair_keys, bias.pairs)
        if layout.texts:
            seen = _for_all_queries(padding.text_keys)
            parts.append(_sdpa(*_each(texts, layout.texts), seen, bias.texts).flatten(0, 1))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


QKV = tuple[Tensor, Tensor, Tensor]


def _each(qkv: tuple[Tensor, ...], sequences: int) -> QKV:
    """[n * L, H, C] -> [n, L, H, C], for queries, keys and values."""
    q, k, v = (x.unflatten(0, (sequences, -1)) for x in qkv)
    return q, k, v


def _attend_joined(images: QKV, texts: QKV, text_keys: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """-> [image rows, text rows]."""
    q, k, v = (torch.cat(both, 1) for both in zip(images, texts, strict=True))
    lengths = [images[0].shape[1], texts[0].shape[1]]
    out = _sdpa(q, k, v, _for_all_queries(_with_image(text_keys, lengths[0])), bias)
    return [part.flatten(0, 1) for part in out.split(lengths, 1)]


def _attend_causally(images: QKV, texts: QKV, text_keys: Tensor | None, bias: Tensor | None) -> list[Tensor]:
    """-> [image rows, text rows]."""
    image_len, length = images[0].shape[1], texts[0].shape[1]
    k, v = (torch.cat(both, 1) for both in zip(images[1:], texts[1:], strict=True))
    seen = torch.ones(length, image_len + length, dtype=torch.bool, device=k.device).tril(image_len)
    if text_keys is not None:
        seen = seen & _for_all_queries(_with_image(text_keys, image_len))
    image_bias = None if bias is None else bias[:, :image_len, :image_len]
    text_bias = None if bias is None else bias[:, image_len:]
    image_out, text_out = _sdpa(*images, None, image_bias), _sdpa(texts[0], k, v, seen, text_bias)
    return [image_out.flatten(0, 1), text_out.flatten(0, 1)]


def _with_image(text_keys: Tensor | None, image_len: int) -> Tensor | None:
    return None if text_keys is None else F.pad(text_keys, (image_len, 0), value=True)


def _for_all_queries(keys_NL: Tensor | None) -> Tensor | None:
    return None if keys_NL is None else keys_NL[:, None, None, :]


def _sdpa(q_NLHC: Tensor, k_NLHC: Tensor, v_NLHC: Tensor, seen: Tensor | None, bias: Tensor | None) -> Tensor:
    """`seen` bool and `bias` float both broadcast to [N, H, L, L]."""
    if bias is not None:
        assert len(bias) == q_NLHC.shape[2], (bias.shape, q_NLHC.shape)
        bias = bias.to(q_NLHC.dtype)
        seen = bias if seen is None else torch.where(seen, bias, -torch.inf)
    q, k, v = (x.transpose(1, 2) for x in (q_NLHC, k_NLHC, v_NLHC))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)


def _pack(layout: Layout, pair_keys: Tensor, text_keys: Tensor) -> Packing:
    place = torch.arange(layout.image_rows, layout.rows, device=text_keys.device)
    images, pairs, texts = place.split([layout.pair_image_rows, layout.pair_text_rows, layout.text_rows])
    both = torch.cat([images.view(layout.pairs, layout.image_len), pairs.view(layout.pairs, layout.pair_len)], 1)
    keys = F.pad(pair_keys, (layout.image_len, 0), value=True)
    # The one place that waits for the device, once for all blocks.
    rows = torch.cat([both[keys], texts.view_as(text_keys)[text_keys]])
    starts = F.pad(torch.cat([keys.sum(1), text_keys.sum(1)]).cumsum(0), (1, 0)).to(torch.int32)
    return Packing(rows, starts, max(layout.image_len + layout.pair_len if layout.pairs else 0, layout.text_len))


def _attend_packed(q_THC: Tensor, k_THC: Tensor, v_THC: Tensor, layout: Layout, packing: Packing) -> Tensor:
    """The pair and text rows; rows of padding come out as zero."""
    q, k, v = (x.index_select(0, packing.rows) for x in (q_THC, k_THC, v_THC))
    kernel = _varlen_kernel()
    assert kernel is not None
    attended = kernel(q, k, v, packing.starts, packing.starts, packing.longest, packing.longest)
    out = attended.new_zeros(layout.rows - layout.image_rows, *attended.shape[1:])
    return out.index_copy(0, packing.rows - layout.image_rows, attended)


@cache
def _varlen_kernel() -> Callable[..., Tensor] | None:
    """torch's own (2.10 on), else flash-attn's, else none; both take (q, k, v, starts, starts, longest, longest)."""
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
