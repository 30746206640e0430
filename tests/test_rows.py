"""The index of a batch, against loops; rows that are taken and put back; padding left out, against padding hidden."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pretrain.batch import PAD, Batch, Kinds, Layout
from pretrain.layers import whole_pass
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.rows import Rows, put_at, take
from tests.toy_models import CONFIGS, PATCHES, ROUTES, encoder, random_batch

# Texts of a few words among many rows, so that most of the padding is left out.
LONG = replace(ROUTES["masked data"], pair_len=12, text_len=12, texts=8)
LAYOUTS = {**ROUTES, "long": LONG, "dual": Layout(4, 2, 6, PATCHES, 12, 12, dual=3)}


def real_rows(batch: Batch) -> torch.Tensor:
    """bool [rows]: no padding."""
    texts = torch.cat([keys.flatten() for keys in batch.keys_seen])
    return torch.cat([torch.ones(batch.layout.vision_rows, dtype=torch.bool), texts])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_index_says_what_loops_find(name):
    batch = random_batch(LAYOUTS[name]).indexed()
    layout, index, seen = batch.layout, batch.index, real_rows(batch)
    assert index is not None
    real = index.real or Rows.of(torch.arange(layout.rows), layout.counts)
    assert set(seen.nonzero().flatten().tolist()) <= set(real.places.tolist()), "no word is left out"
    kinds = torch.arange(layout.rows).split(list(layout.counts))
    for kind, count in zip(kinds, real.counts, strict=True):
        own = torch.isin(real.places, kind)
        step = max(8, -(-len(kind) // 32 // 8) * 8)
        assert own.sum() == count == min(len(kind), -(-int(seen[kind].sum()) // step) * step)
    _, pair_images, pair_texts, texts = Kinds.split(torch.arange(layout.rows), layout)
    sequences = [*torch.cat([pair_images, pair_texts], 1), *texts]
    assert len(index.starts) == len(sequences) + 1
    for rows, start, end in zip(sequences, index.starts[:-1], index.starts[1:], strict=True):
        there = real.places[index.joined[start:end] + layout.image_rows]
        assert torch.equal(there, rows[seen[rows]])
    assert torch.equal(index.hidden, batch.hidden.pack().nonzero().flatten())
    alone = layout.images - layout.dual
    groups = [batch.hidden.images[:alone], batch.hidden.images[alone:], *batch.hidden[1:3]]
    groups += [batch.hidden.texts[: layout.dual], batch.hidden.texts[layout.dual :]]
    assert list(index.hidden_counts) == [int(group.sum()) for group in groups]
    assert index.lengths == tuple(tuple(keys.sum(1).tolist()) for keys in batch.keys_seen)


def test_shapes_repeat_whatever_the_lengths():
    """Texts of 1 to 500 words in 64 sequences of 512 rows: never more than a 32th more rows than there are words."""
    layout, counts = Layout(texts=64, text_len=512), set()
    for seed in range(40):
        batch = random_batch(layout, seed, padded=False)
        ends = torch.randint(1, 500, (64, 1), generator=torch.Generator().manual_seed(seed))
        batch.text_inputs.masked_fill_(torch.arange(512) >= ends, PAD)
        index = batch.indexed().index
        assert index is not None and index.real is not None
        assert 0 <= len(index.real.places) - int(ends.sum()) < layout.rows / 32
        counts.add(index.real.counts)
    assert len(counts) <= 8


def test_taken_rows_go_back_and_their_gradients_too():
    places = torch.tensor([1, 2, 5])
    rows = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(take(rows, places), rows[places])
    assert torch.equal(put_at(take(rows, places), places=places, length=7)[places], rows[places])
    assert torch.autograd.gradcheck(lambda x: take(x, places), rows)
    assert torch.autograd.gradcheck(
        lambda x: put_at(x, places=places, length=9), rows[places].detach().requires_grad_()
    )


def test_an_index_goes_with_its_batch_and_not_with_a_changed_one():
    batch = random_batch(LONG).indexed()
    assert batch.indexed() is batch and batch.on_host is batch
    assert batch.with_tensors({"image_codes": batch.image_codes + 1}).index is batch.index
    assert batch.with_tensors({"pair_inputs": batch.pair_inputs}).index is None
    assert replace(batch, text_inputs=batch.text_inputs).index is None
    moved = batch.to("meta")
    assert moved.index.hidden.device.type == "meta" and moved.index.real.counts == batch.index.real.counts
    assert moved.on_host.index is batch.index and torch.equal(moved.on_host.text_masked, batch.text_masked)
    assert moved.on_host.hidden.pack().any() and not len(moved.on_host.images), "the pictures do not stay"
    again = moved.with_tensors({"image_codes": moved.image_codes})
    assert again.on_host is moved.on_host and again.indexed() is again


def with_padding(batch: Batch) -> Batch:
    """The batch with an index that leaves nothing out."""
    made = batch.indexed()
    assert made.index is not None
    joined = made.index.joined  # of packed attention alone
    return made.with_index(made.index._replace(real=None, joined=joined), None)


@pytest.mark.parametrize("route", ["masked data", "captioning", "language", "long"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [0, 2])
def test_a_pass_without_padding_is_the_pass_with_it(name, route, checkpointing):
    """Rows that are no padding, and all gradients of what reads them."""
    model: MultiwayEncoder = encoder(CONFIGS[name], drop_path=0.3, checkpointing=checkpointing)
    layout = replace(LAYOUTS[route], **({"pair_len": 12} if route == "captioning" else {}))
    batch = random_batch(layout, cfg=CONFIGS[name], drop_path=True)
    seen = real_rows(batch)
    weight = torch.randn(layout.rows, model.cfg.dim) * seen[:, None]
    results = []
    for one in (batch.indexed(), with_padding(batch)):
        share = whole_pass(one, seen)
        assert (share.own is None) == (one.index.real is None)
        for needed in (None, seen):
            model.zero_grad()
            rows = model.rows(one, needed)
            (rows * weight).sum().backward()
            results.append((rows[seen], [p.grad.clone() for p in model.parameters()]))
    assert batch.indexed().index.real is not None, "this layout leaves rows out"
    for rows, grads in results[1:]:
        torch.testing.assert_close(rows, results[0][0], atol=2e-6, rtol=1e-5)
        for a, b in zip(grads, results[0][1], strict=True):
            torch.testing.assert_close(a, b, atol=5e-5, rtol=1e-4)
