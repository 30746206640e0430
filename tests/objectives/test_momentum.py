"""The momentum teacher and its queue: the loss by a plain formula, what moves after a step, and ranks under ZeRO."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pretrain.batch import Layout
from pretrain.checkpoint.weights import write_weights
from pretrain.config import BatchSize, Recipe, Stage, to_json
from pretrain.data.sources import PairShards
from pretrain.distributed import world_size
from pretrain.layers import PLAIN, Layers
from pretrain.models.lora import Lora
from pretrain.objectives.matching import Matching
from pretrain.objectives.momentum import MomentumContrast, Queue
from pretrain.optim import Optim, build_optimizer, schedule
from pretrain.parallel.mesh import create_mesh
from pretrain.parallel.sizes import Parallel
from pretrain.run.start_weights import load_start
from pretrain.tasks.pretrain import PretrainTask
from tests.distributed import run_ranks
from tests.step_batches import CONFIGS, DUAL, MODELS, Trained, dual_batch, mean_reports, train_alone, train_on_ranks

MODEL, EXPERTS = MODELS["paper"], ("vision", "language", "fusion")
OPTIM, STEPS = Optim(lr=5e-4, warmup_steps=2, clip=1.0), 10
# A scale of 2 and not of 14, by which rounding would be multiplied.
CONTRAST = MomentumContrast(embed_dim=12, temperature=0.5, momentum=0.9, queue=3 * DUAL, alpha=0.4, ramp_steps=4)


def build(layers: Layers = PLAIN, contrast: MomentumContrast = CONTRAST) -> PretrainTask:
    torch.manual_seed(0)
    return PretrainTask(MODEL, EXPERTS, (contrast, Matching()), layers)


def alone(contrast: MomentumContrast = CONTRAST) -> tuple[PretrainTask, Trained]:
    task = build(contrast=contrast)
    task.before_training([])
    return task, train_alone(task, OPTIM, [dual_batch(step) for step in range(1, STEPS + 1)])


def test_the_loss_is_albefs():
    task, batch = build(), dual_batch(1)
    task.before_training([])
    head, layout = task.objectives["contrastive"], batch.layout
    teacher = copy.deepcopy(task)
    for value in head.teacher.parts.buffers():
        value.add_(0.05 * torch.randn_like(value))
    state = {name.removeprefix("parts."): value for name, value in head.teacher.named_buffers()}
    teacher.encoder.load_state_dict(
        {k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")}
    )
    plain = teacher.objectives["contrastive"]
    plain.vision.weight.data.copy_(state["vision.weight"])
    plain.language.weight.data.copy_(state["language.weight"])
    head.queue.steps.fill_(3)
    images, texts = head.embed(task.encoder(batch), layout)
    with torch.no_grad():
        taught_images, taught_texts = plain.embed(teacher.encoder(batch), layout)
    losses = []
    for asking, taught, known in (
        (images, taught_images, torch.cat([taught_texts, head.queue.texts])),
        (texts, taught_texts, torch.cat([taught_images, head.queue.images])),
    ):
        alpha = 0.4 * 3 / 4
        targets = alpha * (taught @ known.T / 0.5).softmax(-1)
        targets[torch.arange(DUAL), torch.arange(DUAL)] += 1 - alpha
        losses.append(-((asking @ known.T / 0.5).log_softmax(-1) * targets).sum(-1).mean())
    torch.testing.assert_close(head(task.encoder(batch), batch)["loss"], (losses[0] + losses[1]) / 2)


def test_a_step_moves_teacher_and_queue():
    task = build()
    task.before_training([])
    head = task.objectives["contrastive"]
    buffers = dict(head.teacher.parts.named_buffers())
    for name, value in task.encoder.named_parameters():
        assert buffers[f"encoder.{name}"].equal(value) and buffers[f"encoder.{name}"].data_ptr() != value.data_ptr()
    first = head.queue.images.clone()
    start = {name: value.clone() for name, value in buffers.items()}
    task(dual_batch(1))["loss"].backward()
    with torch.no_grad():
        for value in task.parameters():
            value.add_(1)
    taught = head._pending[0].clone()
    task.after_step()
    for name, value in head.teacher.parts.named_buffers():
        torch.testing.assert_close(value, start[name] + 0.1)
    assert head.queue.images[:DUAL].equal(taught) and head.queue.images[DUAL:].equal(first[DUAL:])
    assert not [name for name, _ in task.named_parameters() if "teacher" in name or "queue" in name]
    task.eval()(dual_batch(2))
    task.after_step()
    assert head.queue.images[:DUAL].equal(taught) and int(head.queue.steps) == 1, "an evaluation leaves the queue alone"


def test_a_stage_that_goes_on_from_another_ones_weights_counts_its_own_steps():
    """As a hand-over gives them: teacher, queue and the steps so far, which the ramp of alpha goes by."""
    before, task = build(), build()
    for _ in range(5):
        before.objectives["contrastive"].queue.take(torch.eye(DUAL, 12), torch.eye(DUAL, 12))
    task.load_state_dict(before.state_dict())
    head = task.objectives["contrastive"]
    assert int(head.queue.steps) == 5
    task.before_training([])
    assert int(head.queue.steps) == 0 and head.queue.images.equal(before.objectives["contrastive"].queue.images)


def test_a_stage_may_have_a_longer_queue_than_the_one_before(tmp_path):
    before, task = build(), build(contrast=replace(CONTRAST, queue=5 * DUAL))
    weights = tmp_path / "weights.safetensors"
    write_weights(before.state_dict(), weights, {"model": to_json(MODEL)})
    stage = Stage(mix={"dual": PairShards("x", text_len=8)}, batch=BatchSize(dual=DUAL), optim=OPTIM, steps=1,
                  objectives=(replace(CONTRAST, queue=5 * DUAL), Matching()), init_from=str(weights))  # fmt: skip
    fresh = task.objectives["contrastive"].queue.images.clone()
    load_start(task, Recipe("x", MODEL, {"x": stage}), stage, tmp_path, None, create_mesh(Parallel()))
    head = task.objectives["contrastive"]
    assert head.queue.images.equal(fresh) and head.vision.weight.equal(before.objectives["contrastive"].vision.weight)


def test_the_queue_forgets_the_oldest_and_takes_no_nan():
    queue = Queue(torch.zeros(6, 1), torch.zeros(6, 1))
    for step in range(1, 5):
        queue.take(torch.full((2, 1), float(step)), torch.full((2, 1), -float(step)))
    assert queue.images.flatten().tolist() == [4, 4, 2, 2, 3, 3]
    queue.take(torch.tensor([[torch.nan], [5.0]]), torch.tensor([[5.0], [torch.inf]]))
    assert queue.images.flatten().tolist() == [4, 4, 2, 5, 3, 3]
    assert queue.texts.flatten().tolist() == [-4, -4, 5, -2, -3, -3]


def test_teacher_and_queue_stay_exact_in_bf16():
    task = build()
    task.before_training([])
    head = task.objectives["contrastive"]
    before = {name: value.clone() for name, value in head.named_buffers()}
    task.bfloat16()
    assert task.encoder.vision_embed.proj.weight.dtype == torch.bfloat16
    for name, value in head.named_buffers():
        assert value.dtype == before[name].dtype and value.equal(before[name]), name
    report = task(dual_batch(1))
    report["loss"].backward()
    assert report["loss"].isfinite()
    task.after_step()


def train_zero(stages: list[int]) -> list[tuple[Trained, dict[str, Tensor]]]:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, partitioned_init
    from pretrain.parallel.mesh import create_mesh
    from pretrain.parallel.tensor import parallel_layers

    runs, ranks = [], world_size()
    for zero in stages:
        path = CONFIGS / f"zero{zero}.json"
        config = load_ds_config(path, micro=4 * DUAL // ranks, accumulation=1, world=ranks, clip=OPTIM.clip)
        config.pop("bf16", None)
        mesh = create_mesh(Parallel())
        with partitioned_init(config):
            task = build(parallel_layers(mesh))
        engine = build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, STEPS), config)
        trained = train_on_ranks(engine, mesh, dual_batch, STEPS)
        head = engine.module.objectives["contrastive"]
        runs.append((trained, {name: value.clone() for name, value in head.named_buffers()}))
    return runs


def test_four_ranks_under_zero_give_the_losses_of_one_process():
    task, wanted = alone()
    buffers = dict(task.objectives["contrastive"].named_buffers())
    stages = [1, 2, 3]
    everywhere = run_ranks(train_zero, 4, stages, timeout=280)
    for number, zero in enumerate(stages):
        reports = mean_reports([runs[number][0] for runs in everywhere])
        for name in ("loss", "loss/contrastive", "loss/matching", "alpha"):
            off = [abs(own[name] - want[name]) for own, want in zip(reports, wanted.reports, strict=True)]
            assert max(off) <= 1e-6, (zero, name, off)
        state = everywhere[0][number][0].weights
        for name, value in buffers.items():
            for runs in everywhere:
                torch.testing.assert_close(runs[number][1][name], value, atol=1e-5, rtol=0)
            torch.testing.assert_close(
                state[f"objectives.contrastive.{name}"].to(value.dtype), value, atol=1e-5, rtol=0
            )
    assert wanted.reports[-1]["alpha"] == pytest.approx(0.4) and wanted.reports[0]["alpha"] == 0


def test_its_pass_is_the_dual_pairs_alone():
    seen: list[Layout] = []
    task, batch = build(), dual_batch(1)
    task.objectives["contrastive"].teacher.parts.encoder.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].layout)
    )
    task(batch)
    assert seen == [each.layout for each in CONTRAST.passes(batch.layout)]
    assert not CONTRAST.passes(batch.layout)[0].backward


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, r"contrastive\.queue=24 is no multiple of batch\.dual=16, which it takes at once; use 16 or 32"),
        ({"batch": BatchSize(dual=8, accumulation=2)}, r"contrastive needs dual in the mix and batch\.accumulation=1"),
        (
            {"batch": BatchSize(dual=8), "parallel": Parallel(tensor=2)},
            r"momentum teacher, which every rank holds whole",
        ),
        (
            {"batch": BatchSize(dual=8), "lora": Lora(), "init_from": "x"},
            r"lora does not go with the objective contrastive, whose momentum teacher has no adapters",
        ),
    ],
)
def test_stages_that_it_refuses(changes, said):
    options = {"mix": {"dual": PairShards("x", text_len=8)}, "batch": BatchSize(dual=16), "optim": Optim(), "steps": 1,
               "objectives": (CONTRAST,)}  # fmt: skip
    with pytest.raises(ValueError, match=said):
        Stage(**(options | changes))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"momentum": 1.5}, r"contrastive\.momentum=1\.5 is no share; use 0 to 1"),
        ({"queue": -1}, r"contrastive\.queue=-1 is negative; use 0 for none"),
        ({"temperature": 0}, r"temperature=0 must be above 0"),
    ],
)
def test_values_that_are_refused(values, said):
    with pytest.raises(ValueError, match=said):
        MomentumContrast(**values)
