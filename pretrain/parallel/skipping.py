"""A step whose gradients are not finite moves nothing, and nobody waits to find out.

DeepSpeed looks at every gradient on the host, and holds the schedule for a step that it skips: from then on the rate is
another than the step's number says. Here the norm of the gradients, which is on the device, tells torch's fused AdamW
there whether to leave weights, moments and its own count of steps as they are; and the schedule goes on with the steps.
Where DeepSpeed looks all the same (ZeRO-3, a pipeline in bf16, fp32, offload) it skips, and the schedule still goes on.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor


def skip_on_device(engine: Any) -> None:
    """For an engine that was just built."""
    take = engine._take_model_step

    def take_and_go_on(lr_kwargs: Any) -> None:
        take(lr_kwargs)
        if not engine._step_applied:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that no optimizer step came before
                engine.lr_scheduler.step()

    engine._take_model_step = take_and_go_on
    zero = engine.optimizer
    inner = getattr(zero, "optimizer", zero)
    if isinstance(inner, torch.optim.AdamW):
        inner.register_step_pre_hook(lambda *_: _tell(inner, _norm(engine)))
    if engine.bfloat16_enabled() and getattr(zero, "check_grad_overflow", True) is False:
        zero.unscale_and_clip_grads = lambda grads, norm: _clip(grads, norm, zero.clip_grad)


def gradient_norm(engine: Any) -> Tensor | float:
    """The global norm before clipping, of the last optimizer step, where it was computed: to read it may be to wait.
    Infinite where it is not a number; nan before the first step."""
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else norm


def skipped_steps(engine: Any, step: int) -> int:
    """Of the first `step` steps, those that moved nothing: AdamW did not count them. It goes with the moments from one
    start of a run to the next. Waits for the device."""
    zero = engine.optimizer
    states = getattr(zero, "optimizer", zero).state.values()
    return step - max((int(state["step"]) for state in states if "step" in state), default=0)


def _norm(engine: Any) -> Tensor | float:
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    return engine._global_grad_norm if norm is None else norm


def _tell(optimizer: Any, norm: Tensor | float) -> None:
    """`found_inf` is how torch's own GradScaler tells a fused optimizer."""
    optimizer.found_inf = (~torch.isfinite(torch.as_tensor(norm))).float().reshape(())


def _clip(grads: list[Tensor], norm: Tensor, bound: float) -> None:
    """As DeepSpeed's unscale_and_clip_grads for a scale of one, without its look at the norm on the host."""
    scale = torch.clamp((norm + 1e-6) / bound, min=1.0)
    for grad in grads:
        grad.mul_(1.0 / scale)
