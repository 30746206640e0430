"""Rows by kind, and the tensors of a batch by name."""

from __future__ import annotations

import pytest
import torch

from pretrain.batch import BOS, DROP_PATH, EOS, PAD, Kinds, Layout
from tests.toy_models import PATCHES, ROUTES, random_batch


@pytest.mark.parametrize("route", ROUTES)
def test_packed_rows_split_into_kinds_and_back(route):
    layout = ROUTES[route]
    rows = torch.randn(layout.rows, 3, requires_grad=True)
    kinds = Kinds.split(rows, layout)
    assert [kind.shape for kind in kinds] == [(*shape, 3) for shape in layout.shapes]
    assert torch.equal(kinds.pack(), rows) and all(kind._base is not None for kind in kinds), "views"
    start = 0
    for kind, first, count in zip(kinds, kinds.first, layout.counts, strict=True):
        assert torch.equal(kind.flatten(0, 1), rows[start : start + count])
        assert torch.equal(first, rows[start : start + count : max(kind.shape[1], 1)])
        start += count
    weight = torch.randn_like(rows)
    (kinds.pack() * weight).sum().backward()
    assert torch.equal(rows.grad, weight)


def test_rows_of_says_the_first_row_of_each_sequence_or_none():
    layout = Layout(2, 1, 3, patches=4, pair_len=3, text_len=2)
    assert Kinds.rows_of(layout, torch.device("cpu"), first=True).pack().nonzero().flatten().tolist() == [
        *(0, 5), 10, 15, *(18, 20, 22),
    ]  # fmt: skip
    assert not Kinds.rows_of(layout, torch.device("cpu")).pack().any()


def test_a_layout_counts_the_class_row_once():
    assert (Layout(images=2, patches=4).image_len, Layout(images=2, patches=4).rows) == (5, 10)
    assert Layout(texts=2, text_len=3).image_len == 0


def test_every_tensor_has_a_name_and_follows():
    batch = random_batch(ROUTES["masked data"], drop_path=True)
    batch.extra.update(labels=torch.arange(4), answers=("yes", "no"))
    named = dict(batch.tensors())
    assert {f"draws/{DROP_PATH}", "extra/labels", "image_codes", "pair_inputs"} <= named.keys()
    assert "extra/answers" not in named
    doubled = batch.map(lambda value: value * 2)
    assert doubled.layout == batch.layout and doubled.extra["answers"] == ("yes", "no")
    assert torch.equal(doubled.extra["labels"], torch.arange(4) * 2)
    assert all(torch.equal(value, named[name] * 2) for name, value in doubled.tensors())
    moved = dict(batch.to("meta").tensors())
    assert moved.keys() == named.keys() and {value.device.type for value in moved.values()} == {"meta"}


def test_padding_is_no_real_row():
    batch = random_batch(ROUTES["masked data"])
    batch.pair_inputs[:] = torch.tensor([BOS, 7, 8, EOS, PAD, PAD, PAD])  # two pairs
    batch.text_inputs[:] = torch.tensor([BOS, 7, EOS, PAD, PAD, PAD, PAD, PAD, PAD])  # four texts
    assert batch.real_rows() == 5 * (PATCHES + 1) + 2 * 4 + 4 * 3
    assert (batch.real_layout.pair_len, batch.real_layout.text_len) == (4, 3)


def test_with_tensors_replaces_by_name_and_leaves_the_rest():
    batch = random_batch(ROUTES["fusion"], drop_path=True)
    batch.extra["labels"] = torch.zeros(2)
    texts, draws = torch.full_like(batch.pair_inputs, 7), torch.ones(2, 1)
    new = batch.with_tensors({"pair_inputs": texts, "draws/itm": draws, "extra/labels": torch.ones(2)})
    assert new.pair_inputs is texts and new.draws["itm"] is draws and new.extra["labels"].sum() == 2
    assert new.draws[DROP_PATH] is batch.draws[DROP_PATH] and new.pair_tokens is batch.pair_tokens
    assert "itm" not in batch.draws and batch.extra["labels"].sum() == 0, "the batch itself stays as it is"
