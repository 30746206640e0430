"""The task of a stage that trains a visual tokenizer by VQ-KD (BEiT v2, arXiv 2208.06366, 2.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.batch import Batch, Layout
from pretrain.contracts import Task
from pretrain.layers import Layers
from pretrain.models.visual_tokenizer.teachers import Pixels, Teacher
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig


@dataclass(frozen=True)
class TrainTokenizer(Task):
    """Train a visual tokenizer, whose codes must predict a frozen teacher's patch targets. `teacher` is one of Pixels,
    Clip and Encoder in models/visual_tokenizer/teachers.py. The stage's model is a VQKDConfig, and it has no
    objectives."""

    teacher: Any = field(default_factory=Pixels)
    evaluates_loss = True  # evals/reconstruction.py

    def problems(self, model: Any, stage: Any) -> list[str]:
        problems = []
        if model.encodes:
            problems.append(
                f"task=TrainTokenizer does not go with a {type(model).__name__}; give the stage model=VQKDConfig(...)"
            )
        if stage.objectives:
            problems.append("the stage trains a visual tokenizer, which has a loss of its own; leave out objectives")
        if stage.lora is not None:
            problems.append("lora has no encoder to adapt in a visual tokenizer; leave it out")
        if stage.compile:
            problems.append("compile=true has no blocks to compile in a visual tokenizer; set compile=false")
        return problems

    def build(self, model: VQKDConfig, stage: Any, layers: Layers, read: Any) -> TokenizerTask:
        if read is None:  # only names and shapes are wanted
            return TokenizerTask(model, None)
        teacher = self.teacher.build(model, read)
        if teacher.dim != model.target_dim or teacher.distill != model.distill:
            raise ValueError(
                f"task.teacher={self.teacher} gives {teacher.dim} numbers a patch, to be learned by {teacher.distill}, "
                f"but model.target_dim={model.target_dim} and model.distill={model.distill}; set them to the teacher's"
            )
        return TokenizerTask(model, teacher)

    def flops(self, model: VQKDConfig, stage: Any, layout: Layout) -> float:
        """Those of encoder and decoder; the teacher's forward pass is not counted."""
        return model.flops(layout)

    def reads(self) -> dict[str, str]:
        return self.teacher.reads()


class TokenizerTask(nn.Module):
    """The tokenizer and its teacher, which is not a submodule: it is neither trained nor saved."""

    def __init__(self, model: VQKDConfig, teacher: Teacher | None):
        super().__init__()
        self.tokenizer = model.build()
        self._teacher: list[Any] = [teacher]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            target = self._teacher[0](batch.images)
        report = self.tokenizer(batch.images, target)
        return {"loss": report["loss"]} | {_report_name(k): v for k, v in report.items() if k != "loss"}

    def before_training(self, batches: list[Batch]) -> None:
        """Starts the codebook by k-means on the first global batch."""
        self.tokenizer.start_codebook([batch.images for batch in batches])

    def after_step(self) -> None:
        """Moves the codes towards the vectors that all micro-steps and ranks assigned to them."""
        self.tokenizer.after_step()


def _report_name(name: str) -> str:
    return name if name.startswith("codebook") else f"loss/{name}"
