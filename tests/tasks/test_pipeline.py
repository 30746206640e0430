"""The stages of a pipeline one after another in one process, against the whole task: the very same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pretrain.batch import Layout
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.tasks.pipeline import PipelineTask, block_flops, pipeline_bounds
from pretrain.tasks.pretrain import PretrainTask
from tests.parallel.pipeline_ranks import ALL, IMAGES, MASKED, MODEL, PAIRS, TEXTS, TIED, Case, layout_of, micro_batch

VLMO = replace(MODEL, relative_position=True, layer_scale=0.1, text_norm=True)
RELEASED = replace(MODEL, attention="per_modality", sub_norm=True, init="sub_norm", fusion_layers=0)
CASES = {
    "all": Case(ALL),
    "images": Case(IMAGES),
    "pairs": Case(PAIRS),
    "texts": Case(TEXTS),
    "tied": Case(objective=TIED),
    "vlmo": Case(model=VLMO),
    "released": Case(model=RELEASED, experts=("vision", "language")),
    "vision": Case(IMAGES, experts=("vision",)),
    "no drop path": Case(TEXTS, model=replace(MODEL, drop_path=0.0)),
    "checkpointing": Case(model=replace(MODEL, activation_checkpointing=2)),
}


def whole_task(case: Case) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(case.model, case.experts, (case.objective,))


def stages_of(case: Case, bounds: tuple[int, ...]) -> list[PipelineTask]:
    parts = []
    for stage in range(len(bounds) - 1):
        torch.manual_seed(0)
        layout = layout_of(case, 1)
        parts.append(
            PipelineTask(case.model, case.experts, (case.objective,), layout=layout, bounds=bounds, stage=stage)
        )
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
    batch = micro_batch(case, 1, 0, 1)
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
    held = [part.state_dict() for part in parts]
    assert set().union(*held) == set(whole)
    for part in held:
        assert all(torch.equal(value, whole[key]) for key, value in part.items())
    twice = {key for one in held for two in held if one is not two for key in one.keys() & two.keys()}
    assert twice == set(parts[0].shared)
    assert all(part.shared == parts[0].shared for part in parts)
    for key, stages in parts[0].shared.items():
        assert [key in part for part in held] == [stage in stages for stage in range(3)]


def test_without_dice_in_the_batch_the_first_stage_throws_them_for_all():
    case = CASES["all"]
    whole, parts = whole_task(case), stages_of(case, (0, 1, 3, 4))
    batch = replace(micro_batch(case, 1, 0, 1), noise=None)
    torch.manual_seed(7)
    want = whole(batch)["loss"]
    torch.manual_seed(7)
    assert torch.equal(through(parts, batch)["loss"], want)
    torch.manual_seed(8)
    assert not torch.equal(through(parts, batch)["loss"], want)


def test_evaluation_drops_nothing():
    case = CASES["all"]
    whole, parts = whole_task(case).eval(), [part.eval() for part in stages_of(case, (0, 2, 4))]
    batch = micro_batch(case, 1, 0, 1)
    assert torch.equal(through(parts, batch)["loss"], whole(batch)["loss"])


def test_work_is_counted_where_it_is_done():
    model = MultiwayConfig(
        dim=64, depth=8, heads=4, ffn_dim=256, image_size=64, patch_size=8, vocab_size=64_000, max_text_len=64
    )
    layout = Layout(images=4, pairs=4, texts=4, patches=65, pair_len=32, text_len=64)
    costs = block_flops(model, (MASKED,), layout)
    assert costs[0] > costs[1] == costs[6]
    assert costs[-1] > 3 * costs[1], "64,000 words on 64 dimensions are dear"
    headless = block_flops(model, (), layout)
    assert headless[-1] < headless[1], "the last block leaves out rows that nobody reads"
    assert pipeline_bounds(model, (MASKED,), layout, 2)[1] > 4


def test_more_stages_than_blocks():
    with pytest.raises(ValueError, match=r"parallel\.pipe=5 stages are more than the model's 4 blocks"):
        pipeline_bounds(MODEL, (MASKED,), layout_of(Case(), 1), 5)


def test_another_layout_is_refused():
    first = stages_of(CASES["all"], (0, 2, 4))[0]
    with pytest.raises(AssertionError, match="Layout"):
        first(None, micro_batch(CASES["images"], 1, 0, 1))
