"""Those who take a step: our model in the forms of OURS, and OTHERS, each with its AdamW."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from benchmarks.compare.others import HuggingFace, Passes, Torchscale
from pretrain.batch import Batch
from pretrain.contracts import Objective
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.optim import Optim, build_optimizer
from pretrain.released_weights import to_released
from pretrain.tasks.pretrain import PretrainTask

OURS = ("eager", "compiled")
OTHERS: dict[str, type[Passes]] = {"torchscale": Torchscale, "transformers": HuggingFace}


class Contestant:
    """A model and its AdamW; `loss(model, batch)`, in bf16 by autocast."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Batch], torch.Tensor], *, bf16: bool):
        self.model, self.loss, self.bf16 = model, loss, bf16
        self.optimizer = build_optimizer(model, Optim())

    def forward(self, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
            return self.loss(self.model, batch)

    def step(self, batch: Batch) -> float:
        """The CPU seconds that it took."""
        begin = time.process_time()
        self.forward(batch).backward()
        self.update()
        return time.process_time() - begin

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class Bf16Weights(Contestant):
    """Weights in bf16, and AdamW on fp32 copies of them, which become the weights again: as DeepSpeed's ZeRO does."""

    def __init__(self, model: nn.Module, loss: Callable[[Any, Batch], torch.Tensor]):
        super().__init__(model, loss, bf16=True)
        self.copies = {weight: nn.Parameter(weight.detach().clone()) for weight in model.parameters()}
        for group in self.optimizer.param_groups:
            group["params"] = [self.copies[weight] for weight in group["params"]]
        model.bfloat16()

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.loss(self.model, batch)

    def update(self) -> None:
        for weight, copy in self.copies.items():
            if weight.grad is not None:
                copy.grad, weight.grad = weight.grad.float(), None
        super().update()
        with torch.no_grad():
            for weight, copy in self.copies.items():
                weight.copy_(copy)


def ours(
    cfg: MultiwayConfig, objective: Objective, experts: tuple[str, ...], form: str = "eager", *, bf16: bool
) -> Contestant:
    torch.manual_seed(0)
    task = PretrainTask(cfg, experts, (objective,))
    if form == "compiled":
        task.encoder.compile_blocks()
        if bf16:
            return Bf16Weights(task, _our_loss)
    return Contestant(task, _our_loss, bf16=bf16)


def _our_loss(model: Any, batch: Batch) -> torch.Tensor:
    return model(batch)["loss"]


def theirs(name: str, cfg: MultiwayConfig, like: Contestant, codes: int, *, bf16: bool) -> Contestant:
    """Another system's, with a head over so many `codes` of pictures; torchscale's has the weights of `like`."""
    model = OTHERS[name](cfg, codes)
    if isinstance(model, Torchscale):
        state = {
            name: value.detach()[: getattr(value, "real_rows", None)] for name, value in like.model.named_parameters()
        }
        released = to_released(state, cfg)
        renamed = {"mim_head": "image_head", "mlm_head": "text_head"}
        for name, value in renamed.items():
            released = {key.replace(name, value): tensor for key, tensor in released.items()}
        model.load_state_dict(released)
    return Contestant(model, lambda model, batch: model(batch), bf16=bf16)


def check_equal(mine: Contestant, other: Contestant, batch: Batch) -> None:
    """Refuses two whose losses differ."""
    near = 2e-2 if mine.bf16 else 1e-4
    with torch.no_grad():
        losses = [float(one.forward(batch)) for one in (mine, other)]
    if not abs(losses[0] - losses[1]) < near:
        raise ValueError(f"the losses differ, {losses[0]} and {losses[1]}: this would compare different work")
