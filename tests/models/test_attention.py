"""The kernel door: grouped attention against the plain formula, and the variable-length path against the masked one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pretrain.batch import PAD, Batch, Kinds, Layout
from pretrain.models import attention
from pretrain.models.attention import Bias, Padding, attend, can_pack, padding_of
from pretrain.models.multiway import encoder as multiway
from pretrain.rows import put_at, take
from tests.cuda.near import judged
from tests.toy_models import CONFIGS, ROUTES, encoder, random_batch

HEADS, WIDTH = 2, 8
LAYOUTS = [
    Layout(2, 3, 4, 4, 6, 9),
    Layout(2, 0, 0, 4),
    Layout(0, 3, 0, 4, 6),
    Layout(0, 0, 4, 0, 0, 9),
    Layout(2, 0, 4, 4, 0, 9),
    Layout(0, 3, 0, 4, 6, causal=True),
    Layout(2, 3, 4, 4, 6, 9, causal=True),
]
PACKED = [layout for layout in LAYOUTS if layout.language_rows and not layout.causal]
LONG = [*PACKED, replace(LAYOUTS[0], pair_len=40, text_len=50)]


def queries_keys_values(layout: Layout, width: int = WIDTH, **options) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(layout.rows, HEADS, width, **options).requires_grad_() for _ in range(3)]


def no_padding(batch: Batch) -> torch.Tensor:
    """bool [rows]."""
    texts = torch.cat([batch.pair_inputs.flatten(), batch.text_inputs.flatten()]) != PAD
    return torch.cat([torch.ones(batch.layout.vision_rows, dtype=torch.bool), texts.cpu()])


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch, biases=None) -> torch.Tensor:
    """Softmax over the keys of one sequence that are no padding, written out; rows of padding stay zero. `biases`: of
    images, pairs and texts."""
    layout, real = batch.layout, no_padding(batch)
    images, pair_images, pair_texts, texts = Kinds.split(torch.arange(layout.rows), layout)
    out = torch.zeros_like(q)
    for number, rows in enumerate([*images, *torch.cat([pair_images, pair_texts], 1), *texts]):
        kind = (number >= layout.images) + (number >= layout.images + layout.pairs)
        kept, rows = real[rows], rows[real[rows]]
        scores = torch.einsum("qhc,khc->hqk", q[rows], k[rows]) / WIDTH**0.5
        if biases is not None:
            scores = scores + biases[kind][:, kept][:, :, kept]
        if layout.causal and layout.images <= number < layout.images + layout.pairs:
            order = torch.arange(len(rows))
            scores = scores.masked_fill((order > order[:, None]) & (order >= layout.image_len), -torch.inf)
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


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: by_loop)


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, qkv: list, read: torch.Tensor, **near: float) -> None:
    """The rows that are read, and the gradients of what reads only them."""
    torch.testing.assert_close(ours[read].float(), theirs[read].float(), **near)
    weight = torch.randn_like(ours) * read[:, None, None].to(ours.device)
    gradients = [torch.autograd.grad((out * weight).sum(), qkv) for out in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, **near)


def unpadded(qkv: list[torch.Tensor], batch: Batch, *, packed: bool) -> torch.Tensor:
    """The rows without padding through attention, and back to their places."""
    batch = batch.indexed()
    assert batch.index is not None
    padding, real = padding_of(batch, packed=packed), batch.index.real
    if real is None:
        return attend(*qkv, batch.layout, padding)
    own = (take(x, real.places) for x in qkv)
    return put_at(attend(*own, batch.layout, padding), places=real.places, length=batch.layout.rows)


def masked(qkv: list[torch.Tensor], batch: Batch) -> torch.Tensor:
    """All rows through attention, with the padding hidden by a mask."""
    return attend(*qkv, batch.layout, Padding(None, None, *batch.keys_seen))


@pytest.mark.parametrize("long", [False, True])  # padding that fills up the shape only; and such that is left out
@pytest.mark.parametrize(
    ("layout", "packed"), [*((layout, False) for layout in LAYOUTS), *((layout, True) for layout in PACKED)]
)
def test_grouped_attention_is_the_plain_formula(layout, packed, long, kernel):
    layout = replace(layout, pair_len=40, text_len=50) if long else layout
    batch, qkv = random_batch(layout), queries_keys_values(layout)
    out = unpadded(qkv, batch, packed=packed)
    assert_same(out, plain(*qkv, batch), qkv, no_padding(batch), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", LONG)
def test_packed_is_masked(layout, padded, kernel):
    """In fp32, on the CPU; also where a text is nothing but padding, which sees itself."""
    batch, qkv = random_batch(layout, padded=padded), queries_keys_values(layout)
    read = no_padding(batch)
    if padded and layout.texts:
        batch.text_inputs[1] = PAD
        Kinds.split(read, layout).texts[1] = True
    for plain in (masked(qkv, batch), unpadded(qkv, batch, packed=False)):
        packed = unpadded(qkv, batch, packed=True)
        assert_same(packed, plain, qkv, read, atol=1e-6, rtol=1e-5)
        assert not packed[~read].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_an_encoder_packs_where_it_may(name, kernel, monkeypatch):
    """Relative positions are a bias, which the variable-length kernels do not take."""
    model, batch = encoder(CONFIGS[name]), random_batch(ROUTES["masked data"])
    asked = []
    plain = model.rows(batch)
    monkeypatch.setattr(multiway, "can_pack", lambda *_: True)
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: asked.append(name) or by_loop)
    packed, read = model.rows(batch), no_padding(batch)
    torch.testing.assert_close(packed[read], plain[read], atol=1e-5, rtol=1e-5)
    assert len(asked) == (0 if name == "vlmo" else model.cfg.depth)


@pytest.mark.parametrize(
    "but",
    [{}, {"is_cuda": False}, {"dtype": torch.float32}, {"layout": LAYOUTS[1]}, {"layout": LAYOUTS[5]}, {"head_dim": 60},
     {"head_dim": 264}, {"capability": (7, 5)}, {"kernel": None}],
    ids=str,
)  # fmt: skip
def test_packing_is_for_half_precision_on_a_recent_gpu(but, monkeypatch):
    """All of it is asked: without one of them nothing is packed."""
    has = {"is_cuda": True, "dtype": torch.bfloat16, "layout": LAYOUTS[0], "head_dim": 64, "capability": (8, 0)}
    has = has | {"kernel": by_loop} | but
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has["capability"])
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: has["kernel"])
    rows = SimpleNamespace(is_cuda=has["is_cuda"], dtype=has["dtype"], device="cuda")
    assert can_pack(rows, has["layout"], has["head_dim"]) == (not but)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bias_beside_padding_is_the_plain_formula(layout):
    """Outputs, gradients of queries, keys and values, and the bias's own."""
    batch, qkv = random_batch(layout), queries_keys_values(layout)
    lengths = (layout.image_len, layout.image_len + layout.pair_len, layout.text_len)
    biases = [torch.randn(HEADS, n, n).mul_(3).requires_grad_() for n in lengths]
    out, right = attend(*qkv, layout, Padding(None, None, *batch.keys_seen), Bias(*biases)), plain(*qkv, batch, biases)
    used = [bias for bias, count in zip(biases, (layout.images, layout.pairs, layout.texts), strict=True) if count]
    assert_same(out, right, [*qkv, *used], no_padding(batch), atol=2e-6, rtol=1e-5)


def test_the_kernel_gets_one_bias_for_all_sequences(monkeypatch):
    """A mask of the padding that was put into it would make it one for each: 0.65 GB a layer of VLMo's base."""
    layout, given, real = Layout(3, 3, 3, 4, 6, 9), [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *qkv, attn_mask, **options: given.append(attn_mask) or real(*qkv, attn_mask=attn_mask, **options),
    )
    biases = Bias(*(torch.randn(HEADS, n, n).requires_grad_() for n in (5, 11, 9)))
    attend(*queries_keys_values(layout), layout, Padding(None, None, *random_batch(layout).keys_seen), biases)
    assert [mask.numel() for mask in given] == [HEADS * n * n for n in (5, 11, 9)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_gradient_of_a_keys_bias_is_rounding_and_is_not_judged_on_a_gpu(dtype):
    """The softmax takes away what such a bias adds to all scores of a query."""
    model = encoder().to(dtype)
    model.rows(random_batch(ROUTES["masked data"])).float().square().sum().backward()
    size = {name: float(value.grad.norm()) for name, value in model.named_parameters() if ".attention." in name}
    for name, own in size.items():
        if name.endswith("k.shared.bias"):
            other = size[name.replace(".k.", ".q.")]
            assert own < (1e-12 if dtype == torch.float64 else 0.5) * other, name
    kept = {id(value) for value in judged(model)}
    left_out = [name for name, value in model.named_parameters() if id(value) not in kept]
    assert left_out == [f"blocks.{number}.attention.k.shared.bias" for number in range(model.cfg.depth)]


def test_a_bias_is_added_per_head():
    layout = Layout(images=1, patches=2)
    q, k, v = queries_keys_values(layout)
    bias = torch.zeros(HEADS, 3, 3)
    bias[0, :, 1:] = -torch.inf  # head 0 sees only the first row
    out = attend(q, k, v, layout, bias=Bias(images=bias))
    torch.testing.assert_close(out[:, 0], v[:1, 0].expand(3, -1))
    assert not torch.allclose(out[:, 1], v[:1, 1].expand(3, -1))
    with pytest.raises(AssertionError):  # other heads' bias
        attend(q, k, v, layout, bias=Bias(images=bias[:1]))
