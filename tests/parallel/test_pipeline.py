"""The pipeline engine on ranks against one plain process: losses, gradient norms, weights and reports."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from torch import Tensor

from tests.distributed import run_ranks
from tests.parallel.pipeline_ranks import (
    IMAGES,
    MODEL,
    OPTIM,
    PAIRS,
    PP4,
    STEPS,
    TEXTS,
    TIED,
    TP2_PP2,
    Case,
    pipelined,
    plain,
)

VLMO = replace(MODEL, relative_position=True, layer_scale=0.1, text_norm=True)
RELEASED = replace(MODEL, attention="per_modality", sub_norm=True, init="sub_norm")
TOP = ("objectives.*", "encoder.norm.*", "encoder.blocks.3.*")  # with it the first stage has nothing to train
LANGUAGE = ("*.language.*", "objectives.*", "encoder.text_embed.*")
BF16 = "zero1_bf16.json"

TWO_RANKS = {
    "images, accumulation 4": Case(IMAGES, accumulation=4),
    "pairs": Case(PAIRS),
    "texts, accumulation 4": Case(TEXTS, accumulation=4),
    "one expert": Case(IMAGES, experts=("vision",)),
    "frozen experts": Case(trainable=LANGUAGE, accumulation=2),
    "frozen stage": Case(trainable=TOP, accumulation=2),
    "tied": Case(objective=TIED, accumulation=4),
    "tied and frozen": Case(objective=TIED, trainable=("objectives.masked.*", "*blocks*")),
    "vlmo, checkpointing": Case(model=replace(VLMO, activation_checkpointing=1), accumulation=2),
    "bf16, tied, accumulation 4": Case(ds=BF16, objective=TIED, accumulation=4),
}
FOUR_RANKS = {
    "two pipelines": Case(),
    "two pipelines, tied, accumulation 4": Case(objective=TIED, accumulation=4),
    "two pipelines, frozen stage": Case(trainable=TOP, accumulation=2),
    "four stages": Case(parallel=PP4),
    "four stages, vlmo, accumulation 4": Case(parallel=PP4, model=VLMO, accumulation=4),
    "four stages, one frozen": Case(parallel=PP4, trainable=(*TOP, "*.blocks.1.*"), accumulation=2),
    "tensor": Case(parallel=TP2_PP2),
    "tensor, tied, accumulation 4": Case(parallel=TP2_PP2, objective=TIED, accumulation=4),
    "tensor, released": Case(parallel=TP2_PP2, model=replace(RELEASED, activation_checkpointing=2)),
    "tensor, vlmo, frozen stage": Case(parallel=TP2_PP2, model=VLMO, trainable=TOP, accumulation=2),
    "bf16, two pipelines, accumulation 4": Case(ds=BF16, accumulation=4),
    "bf16, tensor": Case(parallel=TP2_PP2, ds=BF16),
}


@cache
def on_one_device(case: Case):
    return plain(replace(case, accumulation=1, ds="zero1.json", parallel=Case.parallel))


def check(name: str, case: Case, ranks: list[tuple]) -> None:
    """Against one process in fp32. The bf16 cases differ by what bf16 rounds."""
    reports, norms, weights = on_one_device(case)
    loose = case.ds == BF16
    assert max(norms) > OPTIM.clip, f"{name}: clipping must have been active"
    for step in range(STEPS):
        for key, want in reports[step].items():
            got = [rank[0][step][key] for rank in ranks]
            for later, first in zip(got[len(got) // case.parallel.pipe :], got, strict=False):
                assert later == first, f"{name}: the stages were not told the same {key}"
            # A mean over micro-batches of a mean over targets: only losses weigh every sequence alike.
            near = (3e-3 if loose else 1e-6) if key.startswith("loss") else 0.15
            assert sum(got) / len(got) == pytest.approx(want, abs=near), f"{name}: step {step + 1}, {key}"
        for rank in ranks:
            assert rank[0][step].keys() == reports[step].keys(), name
            assert rank[1][step] == pytest.approx(norms[step], rel=1e-2 if loose else 1e-5), f"{name}: {step + 1}, norm"
    state: dict[str, Tensor] = ranks[0][2]
    assert state.keys() == weights.keys(), name
    for key, value in weights.items():
        error = (state[key] - value).abs().max()
        assert error <= (3e-3 if loose else 1e-6), f"{name}: {key} is off by {error:.1e}"


def check_all(cases: dict[str, Case], ranks: int) -> None:
    found = run_ranks(pipelined, ranks, list(cases.values()), timeout=240)
    for number, (name, case) in enumerate(cases.items()):
        check(name, case, [rank[number] for rank in found])


@pytest.mark.slow
def test_two_stages_equal_one_device():
    check_all(TWO_RANKS, 2)


@pytest.mark.slow
def test_stages_with_data_and_tensor_ranks_equal_one_device():
    check_all(FOUR_RANKS, 4)
