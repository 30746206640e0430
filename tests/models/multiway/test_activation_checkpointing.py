"""Less memory, the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.toy_models import CONFIGS, ROUTES, encoder, random_batch


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointing_changes_nothing(name):
    batch, results = random_batch(ROUTES["masked data"]), []
    for every in (0, True, 2):  # blocks
        model = encoder(CONFIGS[name], checkpointing=every, drop_path=0.5)
        torch.manual_seed(7)
        rows = model.rows(batch)
        rows.square().sum().backward()
        results.append([rows, *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.parametrize(("every", "inputs"), [(0, 0), (1, 3), (2, 2), (5, 1)])
def test_the_input_of_every_nth_block_is_stored(every, inputs, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr("pretrain.models.multiway.encoder.checkpoint", counted)
    model, batch = encoder(checkpointing=every), random_batch(ROUTES["vision"])
    model(batch)
    assert len(calls) == inputs
    model.eval()(batch)
    assert len(calls) == inputs, "there is no backward pass to store anything for"
