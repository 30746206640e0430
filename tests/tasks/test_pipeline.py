"""The pipe stages one after another in one process, against the whole task: the very same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from pretrain.batch import Batch, Layout
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pipeline import PipelineTask, block_flops, pipeline_bounds
from pretrain.tasks.pretrain import PretrainTask
from tests.toy_models import CODES, CONFIGS, EXPERTS, PATCHES, random_batch

DEEP = {name: replace(cfg, depth=4, init_std=0.1) for name, cfg in CONFIGS.items()}
MASKED, TIED = (MaskedData(image_codes=CODES, tied_text_head=tied) for tied in (False, True))


class Case(NamedTuple):
    counts: tuple[int, int, int] = (8, 8, 8)  # images, pairs, texts
    model: MultiwayConfig = DEEP["paper"]
    experts: tuple[str, ...] = EXPERTS
    objective: MaskedData = MASKED
    drop_path: float = 0.3
    checkpointing: int = 0

    @property
    def batch(self) -> Batch:
        layout = Layout(*self.counts, PATCHES, pair_len=8, text_len=10)
        return random_batch(layout, cfg=self.model, drop_path=True)

    @property
    def built(self) -> tuple[tuple, dict[str, Any]]:
        """The arguments of both tasks."""
        options = {"drop_path": self.drop_path, "checkpointing": self.checkpointing}
        return (self.model, self.experts, (self.objective,)), options


CASES = {
    "all": Case(),
    "images": Case((8, 0, 0)),
    "pairs": Case((0, 8, 0)),
    "texts": Case((0, 0, 8)),
    "tied": Case(objective=TIED),
    "vlmo": Case(model=DEEP["vlmo"]),
    "released": Case(model=DEEP["released"], experts=("vision", "language")),
    "vision": Case((8, 0, 0), experts=("vision",)),
    "no drop path": Case((0, 0, 8), drop_path=0.0),
    "checkpointing": Case(checkpointing=2),
}


def whole_task(case: Case) -> PretrainTask:
    torch.manual_seed(0)
    arguments, options = case.built
    return PretrainTask(*arguments, **options)


def stages_of(case: Case, bounds: tuple[int, ...]) -> list[PipelineTask]:
    parts = []
    for stage in range(len(bounds) - 1):
        torch.manual_seed(0)
        arguments, options = case.built
        parts.append(PipelineTask(*arguments, layout=case.batch.layout, bounds=bounds, stage=stage, **options))
    return parts


def through(parts: list[PipelineTask], batch):
    sent = None
    for part in parts:
        sent = part(sent, batch if part.stage in (0, len(parts) - 1) else None)
    return sent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_chain_of_stages_is_the_whole_task(name, dtype):
    case = CASES[name]
    whole, parts = whole_task(case).to(dtype), [part.to(dtype) for part in stages_of(case, (0, 1, 3, 4))]
    batch = case.batch
    want, got = whole(batch), through(parts, batch)
    assert want.keys() == got.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key
    want["loss"].backward()
    got["loss"].backward()
    gradients = {}
    for part in parts:
        for key, value in part.named_parameters():
            assert value.grad is not None, key
            gradients[key] = gradients.get(key, 0) + value.grad
    assert gradients.keys() == {key for key, _ in whole.named_parameters()}
    # The gradient of what several stages share is summed in another order.
    near = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    for key, value in whole.named_parameters():
        torch.testing.assert_close(gradients[key], value.grad, **near, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", ["all", "tied", "vlmo"])
def test_stages_have_the_names_and_numbers_of_the_whole(name):
    case = CASES[name]
    whole = whole_task(case).state_dict()
    parts = stages_of(case, (0, 2, 3, 4))
    states = [part.state_dict() for part in parts]
    assert set().union(*states) == set(whole)
    for state in states:
        assert all(torch.equal(value, whole[key]) for key, value in state.items())
    twice = {key for one in states for two in states if one is not two for key in one.keys() & two.keys()}
    assert twice == set(parts[0].shared)
    assert all(part.shared == parts[0].shared for part in parts)
    for key, stages in parts[0].shared.items():
        assert [key in state for state in states] == [stage in stages for stage in range(3)]


def test_without_draws_in_the_batch_the_first_stage_draws_for_all():
    case = CASES["all"]
    whole, parts = whole_task(case), stages_of(case, (0, 1, 3, 4))
    batch = replace(case.batch, draws={})
    torch.manual_seed(7)
    want = whole(batch)["loss"]
    torch.manual_seed(7)
    assert torch.equal(through(parts, batch)["loss"], want)
    torch.manual_seed(8)
    assert not torch.equal(through(parts, batch)["loss"], want)


def test_evaluation_drops_nothing():
    case = CASES["all"]
    whole, parts = whole_task(case).eval(), [part.eval() for part in stages_of(case, (0, 2, 4))]
    batch = case.batch
    assert torch.equal(through(parts, batch)["loss"], whole(batch)["loss"])


def test_work_is_counted_where_it_is_done():
    model = MultiwayConfig(
        dim=64, depth=8, heads=4, ffn_dim=256, image_size=64, patch_size=8, vocab_size=64_000, max_text_len=64
    )
    layout = Layout(images=4, pairs=4, texts=4, patches=64, pair_len=32, text_len=64)
    costs = block_flops(model, (MASKED,), layout)
    assert costs[0] > costs[1] == costs[6]
    assert costs[-1] > 3 * costs[1], "64,000 words on 64 dimensions are dear"
    headless = block_flops(model, (), layout)
    assert headless[-1] < headless[1], "the last block leaves out rows that nobody reads"
    assert pipeline_bounds(model, (MASKED,), layout, 2)[1] > 4


def test_another_layout_is_refused():
    first = stages_of(CASES["all"], (0, 2, 4))[0]
    with pytest.raises(AssertionError, match="Layout"):
        first(None, CASES["images"].batch)


def test_what_a_stage_reads_from_the_sheet_lies_where_the_sheet_does():
    """The middle stages make an index of it: all of one device's tensors, or none."""
    first = stages_of(CASES["all"], (0, 2, 4))[0]
    sheet = first(None, CASES["all"].batch)[first.layout.rows :]
    known = first._read_sheet(sheet.to("meta"))
    assert {value.device.type for _, value in known.tensors()} == {"meta"}
