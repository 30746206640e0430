"""A step whose gradients are not finite moves nothing, and the host does not wait to find out.

DeepSpeed checks every gradient on the host, and stops the schedule for a step that it skips, so that from then on the
learning rate no longer fits the step's number. Here the norm of the gradients, which lies on the device, tells torch's
fused AdamW there whether to leave weights, moments and its own count of steps unchanged; the schedule goes on with the
steps. Where DeepSpeed checks all the same (ZeRO-3, a pipeline in bf16, fp32, offload), it skips the step, and the
schedule still goes on.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor


def skip_on_device(engine: Any) -> None:
    """Changes a new engine in place, so that it skips steps as the top of this file says."""
    take = engine._take_model_step

    def take_and_go_on(lr_kwargs: Any) -> None:
        take(lr_kwargs)
        if not engine._step_applied:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that no optimizer step came before
                engine.lr_scheduler.step()

    engine._take_model_step = take_and_go_on
    zero = engine.optimizer
    inner = getattr(zero, "optimizer", zero)
    if isinstance(inner, torch.optim.AdamW):
        inner.register_step_pre_hook(lambda *_: _tell(inner, _norm(engine)))
    if engine.bfloat16_enabled() and getattr(zero, "check_grad_overflow", True) is False:
        zero.unscale_and_clip_grads = lambda grads, norm: _clip(grads, norm, zero.clip_grad)


def gradient_norm(engine: Any) -> Tensor | float:
    """The global gradient norm of the last optimizer step, before clipping. It lies where it was computed, so that
    reading it may wait for the device. Infinite if it is not a number; NaN before the first step."""
    norm = engine.get_global_grad_norm()
    return math.nan if norm is None else norm


def skipped_steps(engine: Any, step: int) -> int:
    """How many of the first `step` steps were skipped, by AdamW's count, which is stored with the moments and so covers
    earlier starts of the run. Waits for the device."""
    zero = engine.optimizer
    states = getattr(zero, "optimizer", zero).state.values()
    return step - max((int(state["step"]) for state in states if "step" in state), default=0)


def _norm(engine: Any) -> Tensor | float:
    norm = getattr(engine.optimizer, "_global_grad_norm", None)
    return engine._global_grad_norm if norm is None else norm


def _tell(optimizer: Any, norm: Tensor | float) -> None:
    """Sets `found_inf`, by which torch's GradScaler too tells a fused optimizer to skip a step."""
    optimizer.found_inf = (~torch.isfinite(torch.as_tensor(norm))).float().reshape(())


def _clip(grads: list[Tensor], norm: Tensor, bound: float) -> None:
    """DeepSpeed's unscale_and_clip_grads for a scale of one, without reading the norm on the host."""
    scale = torch.clamp((norm + 1e-6) / bound, min=1.0)
    for grad in grads:
        grad.mul_(1.0 / scale)
