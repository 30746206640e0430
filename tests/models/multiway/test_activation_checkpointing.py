"""Less memory, the same numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.models.multiway.test_encoder import CONFIGS, ROUTES, SHARED, batch_of, encoder


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_nothing(name):
    batch, results = batch_of(ROUTES["masked data"]), []
    for every in (0, True, 2):  # blocks
        model = encoder(dataclasses.replace(CONFIGS[name], activation_checkpointing=every, drop_path=0.5))
        torch.manual_seed(7)
        rows = model(batch)
        rows.square().sum().backward()
        results.append([rows, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.parametrize(("every", "kept"), [(0, None), (1, 3), (2, 2), (5, 1)])
def test_checkpointing_keeps_the_input_of_every_nth_block(every, kept, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("pretrain.models.multiway.encoder.checkpoint", counted)
    model = encoder(dataclasses.replace(SHARED, activation_checkpointing=every))
    model(batch_of(ROUTES["vision"]))
    assert len(calls) == (kept or 0)
    model.eval()(batch_of(ROUTES["vision"]))
    assert len(calls) == (kept or 0), "there is no backward pass to keep anything for"
