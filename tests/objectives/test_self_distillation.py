"""Self-distillation: the loss by plain loops, what moves after a step, a start from the middle, and what it refuses.
tests/parity has it under ZeRO-0 to 3 on two ranks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.batch import Batch, Layout, make_batch
from pretrain.config import BatchSize, Stage
from pretrain.data.sources import ImageShards, TextShards
from pretrain.objectives.self_distillation import SelfDistillation, crop, draw_views
from pretrain.optim import Optim, build_optimizer
from pretrain.parallel.sizes import Parallel
from pretrain.recipes import find_recipe
from pretrain.tasks.pretrain import PretrainTask
from tests.step_batches import DUAL, EXPERTS, MODELS, dual_batch

MODEL, PICTURES = MODELS["paper"], 2 * DUAL
CFG = SelfDistillation(3, momentum=0.9, prototypes=12, hidden_dim=16, bottleneck_dim=8, center_momentum=0.8)


def batch_of(step: int) -> Batch:
    made = torch.Generator().manual_seed(step)
    batch = dual_batch(step)
    batch.draws[CFG.name] = torch.rand(2 * PICTURES, CFG.draws, generator=made)
    return batch


def build(cfg: SelfDistillation = CFG) -> tuple[PretrainTask, Any]:
    torch.manual_seed(0)
    task = PretrainTask(MODEL, EXPERTS, (cfg,))
    task.before_training([])
    head = task.objectives[cfg.name]
    with torch.no_grad():
        for value in head.teacher.buffers():
            value.add_(0.05 * torch.randn_like(value))
        head.centers.mean.normal_(std=0.1)
    return task, head


def plain_crop(picture: Tensor, box: Tensor) -> Tensor:
    """Bilinear, pixel by pixel, of a [3, S, S]."""
    size = picture.shape[-1]
    width, height, left, top = (size * side for side in box.tolist())
    out = torch.zeros_like(picture)
    for y in range(size):
        for x in range(size):
            at_y = min(max(top + height * (y + 0.5) / size - 0.5, 0), size - 1)
            at_x = min(max(left + width * (x + 0.5) / size - 0.5, 0), size - 1)
            for row, share_y in ((math.floor(at_y), 1 - at_y % 1), (math.floor(at_y) + 1, at_y % 1)):
                for column, share_x in ((math.floor(at_x), 1 - at_x % 1), (math.floor(at_x) + 1, at_x % 1)):
                    if share_x * share_y:
                        out[:, y, x] += share_x * share_y * picture[:, row, column]
    return out


def test_the_loss_is_that_of_plain_loops():
    task, head = build()
    batch = batch_of(1)
    views = draw_views(CFG, batch.draws[CFG.name][:PICTURES], 16)
    teacher = copy.deepcopy(task)
    state = {name.removeprefix("parts."): value for name, value in head.teacher.named_buffers()}
    for part, module in (("encoder.", teacher.encoder), ("project.", teacher.objectives[CFG.name].project)):
        own = {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        module.load_state_dict(own)

    def rows(of: PretrainTask, picture: Tensor, mask: Tensor | None = None) -> Tensor:
        masks = torch.zeros(1, 16, dtype=torch.bool) if mask is None else mask[None]
        alone = make_batch(Layout(images=1, patches=16), images=picture[None], image_masks=masks)
        return of.encoder(alone).images[0]

    def targets(logits: Tensor, kind: int) -> Tensor:
        return ((logits - head.centers.mean[kind]) / 0.04).softmax(-1).detach()

    local, masked = [], []
    for number in range(PICTURES):
        picture = batch.images[number].float() / 127.5 - 1
        taught = teacher.objectives[CFG.name].project(rows(teacher, picture))
        for view in range(3):
            seen = plain_crop(picture, views.boxes[view * PICTURES + number])
            said = (head.project(rows(task, seen)[0]) / 0.1).log_softmax(-1)
            local.append(-(targets(taught[0], 0) * said).sum())
        hidden = torch.zeros(16, dtype=torch.bool)
        hidden[views.hidden[number]] = True
        assert hidden.sum() == 8
        said = (head.project(rows(task, picture, hidden)[1:][hidden]) / 0.1).log_softmax(-1)
        masked += list(-(targets(taught[1:][hidden], 1) * said).sum(-1))
    report = task(batch)
    loss = torch.stack(local).mean() + 0.25 * torch.stack(masked).mean()
    torch.testing.assert_close(report["loss"], loss, atol=1e-5, rtol=1e-5)
    parameters = dict(task.named_parameters())
    wanted = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    report["loss"].backward()
    for (name, value), grad in zip(parameters.items(), wanted, strict=True):
        if grad is not None:
            torch.testing.assert_close(value.grad, grad, atol=2e-5, rtol=1e-4, msg=name)
    assert parameters["encoder.vision_embed.mask_token"].grad.abs().max() > 0


def test_a_box_of_the_whole_picture_is_the_picture():
    pictures = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(crop(pictures, torch.tensor([[1.0, 1, 0, 0]] * 2)), pictures)


def test_views_and_patches_are_the_pictures_own():
    """Each has its own, whatever stands beside it, and in the bounds of the settings."""
    drawn = torch.rand(200, CFG.draws, generator=torch.Generator().manual_seed(0))
    views = draw_views(CFG, drawn, 16)
    some = draw_views(CFG, drawn[70:80], 16)
    assert views.boxes.unflatten(0, (3, 200))[:, 70:80].flatten(0, 1).equal(some.boxes)
    assert views.hidden[70:80].equal(some.hidden) and len({tuple(row) for row in views.hidden.tolist()}) > 150
    width, height, left, top = views.boxes.unbind(1)
    area = width * height
    assert 0.05 - 1e-6 <= area.min() < 0.06 and 0.38 < area.max() <= 0.4 + 1e-6
    assert (left >= 0).all() and (top >= 0).all() and (left + width).max() <= 1 and (top + height).max() <= 1 + 1e-6


def test_a_step_moves_teacher_and_centers():
    task, head = build()
    start = {name: value.clone() for name, value in head.teacher.parts.named_buffers()}
    centers = head.centers.mean.clone()
    students = {f"encoder.{name}": value for name, value in task.encoder.named_parameters()}
    students |= {f"project.{name}": value for name, value in head.project.named_parameters()}
    task(batch_of(1))
    pending = head._pending[0].clone()
    task.after_step()
    for name, value in head.teacher.parts.named_buffers():
        torch.testing.assert_close(value, 0.9 * start[name] + 0.1 * students[name].detach())
    torch.testing.assert_close(head.centers.mean, 0.8 * centers + 0.2 * pending)
    assert pending.shape == (2, 12) and not [name for name, _ in task.named_parameters() if "teacher" in name]
    before = head.centers.mean.clone()
    task.eval()(batch_of(2))
    task.after_step()
    assert head.centers.mean.equal(before), "an evaluation leaves the centers alone"
    task.bfloat16()
    assert head.centers.mean.dtype == torch.float32 and task.train()(batch_of(3))["loss"].isfinite()


def test_a_start_from_the_middle_goes_on_with_the_same_bits():
    optim = Optim(lr=1e-3, warmup_steps=1)

    def go(task: PretrainTask, optimizer: Any, steps: range) -> dict[str, Tensor]:
        for step in steps:
            optimizer.zero_grad()
            task(batch_of(step))["loss"].backward()
            optimizer.step()
            task.after_step()
        return {name: value.clone() for name, value in task.state_dict().items()}

    (task, _), (again, _) = build(), build()
    optimizer = build_optimizer(task, optim)
    middle, moments = go(task, optimizer, range(1, 3)), copy.deepcopy(optimizer.state_dict())
    wanted = go(task, optimizer, range(3, 5))
    again.load_state_dict(middle)
    optimizer = build_optimizer(again, optim)
    optimizer.load_state_dict(moments)
    state = go(again, optimizer, range(3, 5))
    assert all(value.equal(state[name]) for name, value in wanted.items())
    assert not wanted["objectives.self_distillation.centers.mean"].equal(
        middle["objectives.self_distillation.centers.mean"]
    )


def test_its_cost_is_that_of_the_passes_that_it_makes():
    task, head = build()
    seen: list[Layout] = []
    for encoder in (task.encoder, head.teacher.parts.encoder):
        encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].layout))
    task(batch_of(1))
    assert seen == [each.layout for each in CFG.passes(batch_of(1).layout)]
    assert CFG.products(batch_of(1).layout, MODEL)[0].rows == PICTURES * (3 + 8)


def test_a_model_of_one_row_learns_from_local_views_alone():
    from tests.models.fusion.test_late import MODEL as late

    alone = SelfDistillation(2, masked_weight=0, prototypes=12, hidden_dim=16, bottleneck_dim=8)
    for cfg in (alone, SelfDistillation(2, prototypes=12, hidden_dim=16, bottleneck_dim=8)):
        task = PretrainTask(late, EXPERTS, (cfg,))
        task.before_training([])
        batch = batch_of(1)
        batch.draws[cfg.name] = torch.rand(2 * PICTURES, cfg.draws)
        if cfg is alone:
            assert task(batch)["loss"].isfinite()
            continue
        with pytest.raises(ValueError, match=r"masked_weight=0\.25 reads patches, .* set masked_weight=0"):
            task(batch)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"views": 0}, r"self_distillation\.views=0 is below 1"),
        ({"momentum": 1.5}, r"self_distillation\.momentum=1\.5 is no share; use 0 to 1"),
        ({"area": (0.5, 0.1)}, r"area=\(0\.5, 0\.1\) are no two rising shares"),
        ({"masked_ratio": 1.0}, r"masked_ratio=1\.0, masked_weight=0\.25: use a share between 0 and 1"),
        ({"teacher_temperature": 0}, r"teacher_temperature=0 must be above 0"),
    ],
)
def test_values_that_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        SelfDistillation(**values)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mix": {"texts": TextShards("x")}, "batch": BatchSize(texts=4)}, "reads pictures that stand alone"),
        ({"parallel": Parallel(tensor=2)}, "whose teacher every rank holds whole"),
    ],
)
def test_stages_that_it_refuses(changes, said):
    options: dict[str, Any] = {"mix": {"images": ImageShards("x")}, "batch": BatchSize(images=4), "optim": Optim(),
                               "steps": 1, "objectives": (CFG,)}  # fmt: skip
    Stage(**options)
    with pytest.raises(ValueError, match=said):
        Stage(**options | changes)


def test_its_recipe_ends_with_it():
    stages = find_recipe("tiny_siglip2").stages
    names = [[objective.name for objective in stage.objectives] for stage in stages.values()]
    assert names == [["contrastive"], ["contrastive", "self_distillation"]]
    assert stages["dense"].init_from == "contrast" and stages["contrast"].steps == 4 * stages["dense"].steps
