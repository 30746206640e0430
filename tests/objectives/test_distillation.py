"""Distillation from a frozen teacher: the loss by a plain formula, what is trained and saved, ranks under ZeRO."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.checkpoint.weights import write_weights
from pretrain.config import BatchSize, Recipe, Stage, to_json
from pretrain.data.sources import PairShards
from pretrain.data.transforms import ImageTransform
from pretrain.distributed import world_size
from pretrain.layers import PLAIN, Layers
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.distillation import Distillation
from pretrain.optim import Optim, build_optimizer, schedule
from pretrain.parallel.sizes import Parallel
from pretrain.run.build import build_task
from pretrain.run.directory import other_inputs
from pretrain.tasks.pretrain import Pretrain, PretrainTask
from pretrain.tasks.tokenizer import TrainTokenizer
from tests.distributed import run_ranks
from tests.step_batches import CONFIGS, DUAL, MODELS, Trained, dual_batch, mean_reports, train_alone, train_on_ranks
from tests.toys import write_text_model

TEACHER = MODELS["paper"]
MODEL = replace(TEACHER, dim=16, depth=2, ffn_dim=32, fusion_layers=0)
EXPERTS, STEPS = ("vision", "language"), 6
OPTIM = Optim(lr=5e-4, warmup_steps=2, clip=1.0)
OBJECTIVES = (Contrastive(embed_dim=12, temperature=0.5), Distillation("teacher", relations=0.5, features=2.0))
STAGE = Stage(
    mix={"dual": PairShards("x", text_len=8)}, batch=BatchSize(dual=DUAL), optim=OPTIM, steps=STEPS, experts=EXPERTS,
    objectives=OBJECTIVES,
)  # fmt: skip


def teacher(model: Any = TEACHER, embed_dim: int | None = 12) -> PretrainTask:
    torch.manual_seed(5)
    return PretrainTask(model, EXPERTS, (Contrastive(embed_dim, temperature=0.2),))


STATE = teacher().state_dict()


def read(name: str, knob: str) -> tuple[dict[str, Tensor], Any]:
    assert (name, knob) == ("teacher", "distillation.teacher")
    return STATE, TEACHER


def build(layers: Layers = PLAIN, read: Any = read, stage: Stage = STAGE) -> PretrainTask:
    torch.manual_seed(0)
    return Pretrain().build(MODEL, stage, layers, read)


def test_the_loss_is_the_divergence_and_the_distance():
    task, taught, batch = build(), teacher().eval(), dual_batch(1)
    with torch.no_grad():
        wanted = taught.objectives["contrastive"].embed(taught.encoder(batch), batch.layout)
        own = task.objectives["contrastive"].embed(task.encoder(batch), batch.layout)
    relations = []
    for asking, asked in ((0, 1), (1, 0)):
        p = (5 * wanted[asking] @ wanted[asked].T).softmax(-1)
        q = (5 * own[asking] @ own[asked].T).softmax(-1)
        relations.append((p * (p / q).log()).sum(-1).mean())
    features = [(a - b).square().sum(-1).mean() for a, b in zip(own, wanted, strict=True)]
    report = task(batch)
    torch.testing.assert_close(report["distillation/relations"], (relations[0] + relations[1]) / 2)
    torch.testing.assert_close(report["distillation/features"], (features[0] + features[1]) / 2)
    torch.testing.assert_close(report["loss/distillation"], sum(relations) / 4 + sum(features))
    torch.testing.assert_close(report["loss"].detach(), report["loss/contrastive"] + report["loss/distillation"])


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    stage = replace(STAGE, objectives=(Contrastive(12, temperature=0.2), OBJECTIVES[1]))
    task = Pretrain().build(TEACHER, stage, PLAIN, read)
    task.load_state_dict(teacher().state_dict(), strict=True)
    assert task(dual_batch(1))["loss/distillation"].abs() < 1e-5


@pytest.mark.parametrize("options", [{"projection_bias": True}, {"project": False}, {"loss": "sigmoid"}])
def test_a_teacher_with_any_projection_is_its_whole_self(options):
    torch.manual_seed(5)
    other = PretrainTask(TEACHER, EXPERTS, (Contrastive(**options),)).eval()
    with torch.no_grad():
        for value in other.objectives.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    stage = replace(STAGE, objectives=(Contrastive(project=False), Distillation("teacher", features=0.0)))
    task, batch = build(read=lambda name, knob: (other.state_dict(), TEACHER), stage=stage), dual_batch(1)
    with torch.no_grad():
        wanted = other.objectives["contrastive"].embed(other.encoder(batch), batch.layout)
    for own, want in zip(task.objectives["distillation"]._teach(batch), wanted, strict=True):
        torch.testing.assert_close(own, want)
    assert task(batch)["loss"].isfinite()
    own = task.objectives["distillation"].teacher[0].head
    with torch.no_grad():
        own.logit_scale.fill_(117.3).log_()
    assert own.scale().item() == pytest.approx(117.3 if "loss" in options else 100), "released SigLIP's is above 100"


def test_the_teacher_is_neither_trained_nor_saved():
    task = build()
    assert {name.split(".")[0] for name in task.state_dict()} == {"encoder", "objectives"}
    assert not [name for name in task.state_dict() if "distillation" in name]
    before = {name: value.clone() for name, value in task.objectives["distillation"].teacher[0].state_dict().items()}
    train_alone(task, OPTIM, [dual_batch(step) for step in range(1, 3)])
    after = task.objectives["distillation"].teacher[0].state_dict()
    assert all(value.equal(before[name]) for name, value in after.items()) and len(after) == len(before)
    assert build(read=None).objectives["distillation"].teacher == (), "names and shapes need no teacher"


def train_zero(stages: list[int]) -> list[Trained]:
    from pretrain.parallel.ds_config import load_ds_config
    from pretrain.parallel.engine import build_engine, partitioned_init
    from pretrain.parallel.mesh import create_mesh
    from pretrain.parallel.tensor import parallel_layers

    runs, ranks = [], world_size()
    for zero in stages:
        path = CONFIGS / f"zero{zero}.json"
        config = load_ds_config(path, micro=4 * DUAL // ranks, accumulation=1, world=ranks, clip=OPTIM.clip)
        mesh = create_mesh(Parallel())
        with partitioned_init(config):
            task = build(parallel_layers(mesh))
        engine = build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, STEPS), config)
        runs.append(train_on_ranks(engine, mesh, dual_batch, STEPS))
    return runs


def test_ranks_under_zero_give_the_losses_of_one_process():
    wanted = train_alone(build(), OPTIM, [dual_batch(step) for step in range(1, STEPS + 1)])
    stages = [1, 3]
    everywhere = run_ranks(train_zero, 2, stages, timeout=280)
    for number, zero in enumerate(stages):
        reports = mean_reports([runs[number] for runs in everywhere])
        for name in ("loss", "loss/contrastive", "loss/distillation"):
            off = [abs(own[name] - want[name]) for own, want in zip(reports, wanted.reports, strict=True)]
            assert max(off) <= 2e-6, (zero, name, off)


def test_another_teacher_makes_another_run(tmp_path):
    weights, text = tmp_path / "teacher" / "weights.safetensors", tmp_path / "text.model"
    write_text_model(text, ["a red bus", "two dogs"] * 9, 28)
    recipe = Recipe("x", MODEL, {"student": STAGE}, text_tokenizer=str(text))
    inputs = []
    for state in (STATE, teacher(replace(TEACHER, depth=1)).state_dict()):
        write_weights(state, weights, {"model": to_json(TEACHER)})
        inputs.append(other_inputs(recipe, STAGE, tmp_path))
    assert inputs[0][0] == inputs[1][0] and inputs[0][1] != inputs[1][1], "the text tokenizer, and the teacher"
    weights.unlink()
    with pytest.raises(ValueError, match=r"distillation\.teacher=teacher: neither"):
        other_inputs(recipe, STAGE, tmp_path)


def test_a_student_is_evaluated_where_its_teacher_is_gone(tmp_path):
    stage = replace(STAGE, transform=ImageTransform(size=MODEL.image_size))
    recipe = Recipe("x", MODEL, {"student": stage})
    with pytest.raises(ValueError, match=r"distillation\.teacher=teacher: neither"):
        build_task(recipe, stage, tmp_path)
    task = build_task(recipe, stage, tmp_path, trains=False)
    assert task.objectives["distillation"].teacher == () and task.state_dict().keys() == build().state_dict().keys()
    assert Pretrain().evaluates_loss is False and TrainTokenizer().evaluates_loss is True


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            (None, TEACHER),
            r"teacher=teacher has no objectives\.contrastive\.logit_scale; name a stage",
        ),
        ((12, replace(TEACHER, vocab_size=40)), r"has model\.vocab_size=40 and the student 32; use one number"),
        ((12, replace(TEACHER, image_size=32)), r"has model\.image_size=32 and the student 16"),
    ],
)
def test_teachers_that_it_refuses(wrong, said):
    embed_dim, model = wrong
    state = teacher(model).state_dict()
    if embed_dim is None:
        state = {name: value for name, value in state.items() if "contrastive" not in name}
    with pytest.raises(ValueError, match=said):
        build(read=lambda name, knob: (state, model))


def test_vectors_of_another_width_have_no_distance():
    task = build(read=lambda name, knob: (teacher(embed_dim=6).state_dict(), TEACHER))
    with pytest.raises(ValueError, match=r"set embed_dim=6 of Contrastive, or features=0"):
        task(dual_batch(1))
    stage = replace(STAGE, objectives=(OBJECTIVES[0], Distillation("teacher", features=0.0)))
    task = build(read=lambda name, knob: (teacher(embed_dim=6).state_dict(), TEACHER), stage=stage)
    assert task(dual_batch(1))["loss"].isfinite()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objectives": OBJECTIVES[1:]}, r"distillation moves the vectors of Contrastive\(\)"),
        ({"parallel": Parallel(tensor=2)}, r"teacher every rank holds whole"),
    ],
)
def test_stages_that_it_refuses(changes, said):
    with pytest.raises(ValueError, match=said):
        replace(STAGE, **changes)


def test_wrong_weights_of_its_parts():
    for options in ({"relations": -1.0}, {"relations": 0.0, "features": 0.0}):
        with pytest.raises(ValueError, match="distillation"):
            Distillation("teacher", **options)
