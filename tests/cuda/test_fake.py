"""Stages on a GPU that is not there (see fake.py): two steps each, as training takes them. Waits of the second count:
the first fills caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.config import Recipe, Stage
from pretrain.distributed import device
from pretrain.models.visual_tokenizer import teachers
from pretrain.objectives.matching import Matching
from pretrain.optim import build_optimizer
from pretrain.parallel.copy_ahead import copied
from pretrain.parallel.mesh import place_of
from pretrain.parallel.sizes import Parallel
from pretrain.parallel.skipping import _clip, _tell
from pretrain.recipes import find_recipe
from pretrain.rollbacks import RollbackRule
from pretrain.run import build, image_targets, trained
from pretrain.run.inputs import open_data
from pretrain.run.step import Judge, train_step
from tests.cuda.fake import fake_gpu
from tests.cuda.toy_stages import toy, visual_tokenizer, write_toys

# With the tokenizer's restarts, with a CLIP teacher, of words alone, of all kinds with the tokenizer's codes, of
# towers, with matching, of dual pairs, with captions, and with a teacher that follows; the others take longest.
STAGES = (
    "tiny-tokenizer", "beit3_base-tokenizer", "tiny-language", "tiny-fusion", "tiny_towers-resnet_bert",
    "tiny_uniter-fusion", "tiny-retrieval", "tiny-captions",
    *(pytest.param(name, marks=pytest.mark.slow) for name in (
        "tiny_towers-clip", "tiny_towers-brivl", "tiny_blip-fusion", "tiny_albef-fusion", "tiny_vilbert-fusion",
        "tiny_vilt-fusion", "tiny_siglip2-dense",
    )),
)  # fmt: skip
SMALL = 256  # a model of this width is built with its weights; a wider one by shapes alone


class Engine:
    """What DeepSpeed's engine does under ds_configs/zero1_bf16.json, of that which train_step asks: weights in bf16,
    one rank, the norm judged on the device."""

    def __init__(self, task: nn.Module, stage: Stage):
        self.module, self.clip = task, stage.optim.clip
        self.optimizer = build_optimizer(task, stage.optim)
        self.norm: Any = None

    def __call__(self, batch: Any) -> dict[str, Tensor]:
        return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        grads = [value.grad for group in self.optimizer.param_groups for value in group["params"]
                 if value.grad is not None]  # fmt: skip
        self.norm = torch.stack([grad.float().norm() for grad in grads]).norm()
        _clip(grads, self.norm, self.clip or 1.0)
        _tell(self.optimizer, self.norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_toys(tmp_path_factory.mktemp("fake"))


@pytest.fixture(autouse=True)
def weights_of_others(monkeypatch, data):
    """What a stage reads of others is there, with fresh weights."""

    for room in (image_targets, trained):
        monkeypatch.setattr(room, "load_visual_tokenizer", lambda recipe, stage, _: visual_tokenizer(recipe, stage))
    monkeypatch.setenv("CLIP", str(data))
    monkeypatch.setattr(teachers, "_load_clip", _clip_model)
    monkeypatch.setattr(teachers, "_clip_statistics", lambda _: (teachers.CLIP_MEAN, teachers.CLIP_STD))


def _clip_model(directory: Path) -> Any:
    import transformers

    with torch.device("cpu"):
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**sizes, patch_size=16))
        return model.eval().requires_grad_(False)


def rounded(recipe: Recipe, stage: Stage) -> Any:
    """The task in bf16, as the engine holds it; of a wide one shapes alone."""
    wide = getattr(recipe.model_of(stage), "dim", 768) > SMALL
    return build.build_task(recipe, stage, Path("nowhere"), context=torch.device("meta") if wide else None).bfloat16()


@pytest.mark.parametrize("name", STAGES)
def test_steps_of_a_stage_run_on_a_gpu_and_wait_for_nothing(name, data):
    recipe_name, stage_name = name.split("-")
    recipe, stage = toy(find_recipe(recipe_name), stage_name, data)
    steps = list(open_data(recipe, stage, None, place_of(Parallel(), 0, 1)).batches(0, 2))
    task = rounded(recipe, stage)
    with fake_gpu() as gpu:
        gpu.place(task)
        add_targets = image_targets.image_targets(recipe, stage, Path("nowhere"), device())
        engine, judge = Engine(task, stage), Judge(0, RollbackRule(), "")
        for number, micro_batches in enumerate(copied(iter(steps), device()), 1):
            gpu.waits.clear()
            report = train_step(engine, micro_batches, add_targets, first=number == 1)
            judge.note(number, engine.norm, report)
        assert gpu.waits.total() <= waits_allowed(stage), dict(gpu.waits)
        assert report["loss"].is_cuda and report["loss"].dtype == torch.float32, report["loss"]


def waits_allowed(stage: Stage) -> int:
    """Of a step. How long the wrong texts of matching are, and which codes nobody uses, is not known on the host."""
    names = {objective.name for objective in stage.objectives}
    restarts = getattr(stage.model, "restart_after", None) is not None
    return (Matching.name in names) + restarts
