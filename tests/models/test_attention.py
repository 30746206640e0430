"""The kernel door: grouped attention against the plain formula, and the variable-length path against the masked one."""

from __future__ import annotations

import pytest
import torch

from pretrain.batch import PAD, Batch, Layout, make_batch
from pretrain.models import attention
from pretrain.models.attention import Bias, attend, can_pack, padding_of

HEADS, WIDTH = 2, 8


def batch_of(layout: Layout) -> Batch:
    pairs = torch.randint(4, 20, (layout.pairs, layout.pair_len))
    texts = torch.randint(4, 20, (layout.texts, layout.text_len))
    for ids in (pairs, texts):
        for row in range(len(ids)):
            ids[row, 1 + row * 2 :] = PAD
    return make_batch(layout, pair_tokens=pairs, text_tokens=texts)


def queries_keys_values(layout: Layout) -> list[torch.Tensor]:
    return [torch.randn(layout.rows, HEADS, WIDTH, requires_grad=True) for _ in range(3)]


def sequences(layout: Layout) -> list[torch.Tensor]:
    """The rows of every sequence."""
    rows = torch.arange(layout.rows).split(
        [layout.image_rows, layout.pair_image_rows, layout.pair_text_rows, layout.text_rows]
    )
    images, pair_images, pair_texts, texts = (
        part.view(n, -1) if n else []
        for part, n in zip(rows, (layout.images, *[layout.pairs] * 2, layout.texts), strict=True)
    )
    pairs = [torch.cat(both) for both in zip(pair_images, pair_texts, strict=True)]
    return [*images, *pairs, *texts]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Softmax over the keys of one sequence that are no padding, written out; rows of padding stay zero."""
    layout = batch.layout
    padded = torch.zeros(layout.rows, dtype=torch.bool)
    padded[layout.vision_rows :] = torch.cat([batch.pair_inputs.flatten(), batch.text_inputs.flatten()]) == PAD
    out = torch.zeros_like(q)
    for number, rows in enumerate(sequences(layout)):
        rows = rows[~padded[rows]]
        scores = torch.einsum("qhc,khc->hqk", q[rows], k[rows]) / WIDTH**0.5
        if layout.causal and layout.images <= number < layout.images + layout.pairs:
            order = torch.arange(len(rows))
            scores = scores.masked_fill((order > order[:, None]) & (order >= layout.patches), -torch.inf)
        out = out.index_copy(0, rows, torch.einsum("hqk,khc->qhc", scores.softmax(-1), v[rows]))
    return out


def by_loop(q, k, v, starts, other, longest, also_longest):
    """What a variable-length kernel computes."""
    assert starts.dtype == torch.int32 and torch.equal(starts, other) and starts[-1] == len(q)
    parts = []
    for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert 0 < stop - start <= longest == also_longest
        one = (x[start:stop].transpose(0, 1) for x in (q, k, v))
        parts.append(torch.nn.functional.scaled_dot_product_attention(*one).transpose(0, 1))
    return torch.cat(parts)


LAYOUTS = [
    Layout(2, 3, 4, 5, 6, 9),
    Layout(2, 0, 0, 5),
    Layout(0, 3, 0, 5, 6),
    Layout(0, 0, 4, 0, 0, 9),
    Layout(2, 0, 4, 5, 0, 9),
    Layout(0, 3, 0, 5, 6, causal=True),
    Layout(2, 3, 4, 5, 6, 9, causal=True),
]


PACKED = [layout for layout in LAYOUTS if layout.language_rows and not layout.causal]


@pytest.mark.parametrize(
    ("layout", "packed"), [*((layout, False) for layout in LAYOUTS), *((layout, True) for layout in PACKED)]
)
def test_grouped_attention_is_the_plain_formula(layout, packed, monkeypatch):
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: by_loop)
    torch.manual_seed(0)
    batch, qkv = batch_of(layout), queries_keys_values(layout)
    out, expected = attend(*qkv, layout, padding_of(batch, packed=packed)), plain(*qkv, batch)
    read = torch.cat(
        [torch.ones(layout.vision_rows), *((i.flatten() != PAD) for i in (batch.pair_inputs, batch.text_inputs))]
    )
    read = read.bool()
    torch.testing.assert_close(out[read], expected[read], atol=1e-6, rtol=1e-5)
    weight = torch.randn_like(out) * read[:, None, None]
    ours = torch.autograd.grad((out * weight).sum(), qkv)
    theirs = torch.autograd.grad((expected * weight).sum(), qkv)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_packed_path_is_for_half_precision_on_a_gpu():
    layout = LAYOUTS[0]
    for dtype in (torch.float32, torch.bfloat16):
        assert not can_pack(torch.zeros(1, dtype=dtype), layout, 64)


def test_a_bias_is_added_per_head():
    layout = Layout(images=1, patches=3)
    q, k, v = queries_keys_values(layout)
    bias = torch.zeros(HEADS, 3, 3)
    bias[0, :, 1:] = -torch.inf  # head 0 sees only the first row
    out = attend(q, k, v, layout, bias=Bias(images=bias))
    torch.testing.assert_close(out[:, 0], v[:1, 0].expand(3, -1))
    assert not torch.allclose(out[:, 1], v[:1, 1].expand(3, -1))
    with pytest.raises(AssertionError):  # other heads' bias
        attend(q, k, v, layout, bias=Bias(images=bias[:1]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the variable-length kernels are CUDA's")
@pytest.mark.parametrize("layout", PACKED)
def test_the_cuda_kernel_agrees_with_the_masked_one(layout):
    torch.manual_seed(0)
    batch = batch_of(layout)
    on_gpu = batch.to("cuda")
    rows = torch.zeros(layout.rows, 1, device="cuda", dtype=torch.bfloat16)
    assert can_pack(rows, layout, WIDTH)
    base = [torch.randn(layout.rows, HEADS, WIDTH, device="cuda") for _ in range(3)]
    qkv = [x.bfloat16().requires_grad_() for x in base]
    read = torch.cat(
        [torch.ones(layout.vision_rows), *((i.flatten() != PAD) for i in (batch.pair_inputs, batch.text_inputs))]
    )
    read = read.bool().cuda()
    weight = torch.randn(layout.rows, HEADS, WIDTH, device="cuda") * read[:, None, None]
    results = []
    for packed in (True, False):
        out = attend(*qkv, layout, padding_of(on_gpu, packed=packed))
        results.append([out[read].float(), *torch.autograd.grad((out * weight).sum(), qkv)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.float(), b.float(), atol=3e-2, rtol=3e-2)
