"""The optimizer: its settings, parameter groups and learning rate. DeepSpeed wraps the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from types import MappingProxyType

import torch
from torch import nn

SHOWN_GROUPS = 6  # parameter groups in a log line
SCHEDULES = ("cosine", "linear", "constant", "wsd")
# A parameter with one of these in its dotted name is not decayed, although it has two or more dimensions: the class and
# mask tokens, positions and relative position tables. BEiT, BEiT-2, its tokenizer and the released BEiT-3 exempt
# pos_embed, cls_token and embed_positions (their `no_weight_decay()`; BEiT adds the relative position tables with
# --disable_weight_decay_on_rel_pos_bias). They decay the mask token; that we do not is our choice. VLMo decays names
# that its list forgot, in which we do not follow it. SigLIP's code (big_vision) decays kernels alone, so not the probe.
NOT_DECAYED = ("cls", "class_token", "class_row", "mask_token", "position", "pos_embed", "logit_scale", "pool.probe")


@dataclass(frozen=True)
class Optim:
    """AdamW with warmup. Defaults are BEiT-3's pretraining settings (arXiv 2208.10442, table 11)."""

    lr: float = 1e-3
    min_lr: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    warmup_steps: int = 10_000
    clip: float = 3.0  # bound of the global gradient norm; 0 switches clipping off
    layer_decay: float = 1.0  # each layer's rate is this times the rate of the layer above
    head_factor: float = 1.0  # by which the rate of the objectives' own layers is multiplied
    # {shell pattern over parameter names: factor of their rate}, such as {"encoder.vision*": 0.1}; the first pattern
    # that matches counts.
    factors: dict[str, float] = field(default_factory=dict)
    # cosine, linear, constant or wsd (warmup, stable, decay: constant, then linear over the last decay_steps; MiniCPM,
    # arXiv 2404.06395), all after a linear warmup. Only constant, and wsd before its decay, do not depend on the total
    # steps, so that a run continued by --continue-from equals one that had as many steps from its beginning.
    schedule: str = "cosine"
    decay_steps: int = 0  # of wsd

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"optim.schedule={self.schedule!r} is unknown; use {', '.join(SCHEDULES)}")
        if (self.decay_steps > 0) != (self.schedule == "wsd") or self.decay_steps < 0:
            raise ValueError(
                f"optim.decay_steps={self.decay_steps} does not go with optim.schedule={self.schedule!r}; wsd needs 1 "
                "or more, about a tenth of the steps, and the others 0"
            )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"optim.lr={self.lr} must be above 0")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"optim.min_lr={self.min_lr} must lie between 0 and optim.lr={self.lr}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={self.betas} must be two numbers in [0, 1), such as (0.9, 0.98)")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optim.layer_decay={self.layer_decay} must lie in (0, 1]; 1 switches it off")
        if not (math.isfinite(self.head_factor) and self.head_factor > 0):
            raise ValueError(f"optim.head_factor={self.head_factor} must be above 0; 1 switches it off")
        for pattern, factor in self.factors.items():
            if not (math.isfinite(factor) and factor > 0):
                raise ValueError(f"optim.factors.{pattern}={factor} must be above 0; to freeze a part, use trainable")
        for name in ("eps", "weight_decay", "warmup_steps", "clip"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"optim.{name}={value} must be a number of at least 0")


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """The rate of step 1, 2, ... `total_steps`. Warmup ends at `optim.lr` in step `warmup_steps`, decay ends at
    `optim.min_lr` in the last step. A warmup longer than the run is cut to the run's length."""
    warmup = min(optim.warmup_steps, total_steps)
    if step <= warmup:
        return optim.lr * step / warmup
    if optim.schedule == "constant":
        return optim.lr
    begin = warmup if optim.schedule != "wsd" else max(warmup, total_steps - optim.decay_steps)
    if step <= begin:
        return optim.lr
    progress = min((step - begin) / max(total_steps - begin, 1), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if optim.schedule == "cosine" else 1 - progress
    return optim.min_lr + (optim.lr - optim.min_lr) * share


def schedule(optim: Optim, total_steps: int) -> Callable[[int], float]:
    """For LambdaLR: a function from the number of steps done to the factor of the next step's rate."""
    return lambda done: learning_rate(optim, done + 1, total_steps) / optim.lr


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether this parameter is decayed: matrices and kernels are; biases, norms, scales, tokens, positions are not."""
    # Under zero.Init a parameter is empty, and ds_shape is its shape.
    dims = len(getattr(parameter, "ds_shape", parameter.shape))
    return dims >= 2 and not any(part in name for part in NOT_DECAYED)


def parameter_groups(
    module: nn.Module,
    optim: Optim,
    *,
    layer_of: Callable[[str], int] | None = None,
    top: int | None = None,
    first_steps: Mapping[str, int] = MappingProxyType({}),
) -> list[dict]:
    """The trainable parameters, in as few groups as their decay and rate need (ZeRO flattens and pads each group). The
    rate is multiplied by optim.head_factor for parameters of objectives, and by the factor in optim.factors.
    `first_steps`: {parameter: the first step that trains it}; its group has that number as `first_step`.

    With `optim.layer_decay` < 1, `layer_of(name)` is 0 for embeddings, 1, 2, ... for blocks, and one more than the last
    block's for heads and the final norm. The rate is lr * layer_decay ** (top - layer), where `top` is the highest
    layer of the whole module, frozen or not (BEiT's LayerDecayValueAssigner); a pipe stage, which may lack it, must
    pass `top`. Raises ValueError if nothing is trainable, or for layer decay in a model without layers.
    """
    layers: dict[str, int] = {}
    if optim.layer_decay < 1:
        if layer_of is None:
            raise ValueError(f"optim.layer_decay={optim.layer_decay} needs a model with layers; use 1.0 in this stage")
        layers = {name: layer_of(name) for name, _ in module.named_parameters()}
    if top is None:
        top = max(layers.values(), default=0)
    groups: dict[tuple[bool, float, int], dict] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = optim.layer_decay ** (top - layers.get(name, top))
        scale *= optim.head_factor if name.startswith("objectives.") else 1.0
        scale *= next((factor for pattern, factor in optim.factors.items() if fnmatch(name, pattern)), 1.0)
        decayed, first = decays(name, parameter), first_steps.get(name, 1)
        group = {"params": [], "lr": optim.lr * scale, "weight_decay": optim.weight_decay if decayed else 0.0}
        group |= {"first_step": first} if first > 1 else {}
        groups.setdefault((decayed, scale, first), group)["params"].append(parameter)
    if not groups:
        raise ValueError("stage.trainable leaves no parameter to train; open at least one pattern, such as '*'")
    # Sorted, so that the groups do not depend on the order of the module's parameters, and so that the first group's
    # rate, which DeepSpeed reports, is optim.lr and not a head's higher one.
    order = sorted(groups, key=lambda key: (-key[2], key[0], key[1] if key[1] <= 1 else -key[1]), reverse=True)
    return [groups[key] for key in order]


def described(groups: list[dict], optim: Optim) -> str:
    """The groups for a log line: how many numbers each has, its factor on optim.lr, its decay, its first step."""
    parts = []
    for group in groups:
        count = sum(getattr(value, "ds_numel", value.numel()) for value in group["params"])
        parts.append(f"{count / 1e6:.3g} M at {group['lr'] / optim.lr:.3g} x lr, decay {group['weight_decay']:g}")
        parts[-1] += f", from step {group['first_step']} on" if "first_step" in group else ""
    more = f" and {len(parts) - SHOWN_GROUPS} more" if len(parts) > SHOWN_GROUPS else ""
    return "; ".join(parts[:SHOWN_GROUPS]) + more


def build_optimizer(
    module: nn.Module,
    optim: Optim,
    *,
    layer_of: Callable[[str], int] | None = None,
    top: int | None = None,
    first_steps: Mapping[str, int] = MappingProxyType({}),
) -> torch.optim.AdamW:
    """torch's AdamW over `parameter_groups`, fused: one kernel on CUDA, and 40 times the plain loop's speed on CPU."""
    groups = parameter_groups(module, optim, layer_of=layer_of, top=top, first_steps=first_steps)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
