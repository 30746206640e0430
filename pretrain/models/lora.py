"""Low-rank adapters beside frozen linear layers: LoRA (arXiv 2106.09685), with peft's arithmetic and initial weights.

An adapted layer keeps its weight under its own name, so that weights load as before; its adapter adds two parameters,
which `merged` adds to the weight when a stage ends. peft itself is not used: it renames what it wraps, and supports
neither weights that zero.Init splits as they are made nor our packed experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN, UP = "lora_down", "lora_up"  # peft's lora_A and lora_B
ENCODER = "encoder."


@dataclass(frozen=True)
class Lora:
    """`targets`: shell patterns over the names of the encoder's linear layers. The defaults are the paper's for
    RoBERTa base (table 9: queries and values, rank and alpha 8)."""

    rank: int = 8
    alpha: float = 8.0  # an adapter's output is multiplied by alpha / rank
    targets: tuple[str, ...] = ("*.attention.q.*", "*.attention.v.*")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank={self.rank} is below 1; use 4 to 64")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ValueError(f"lora.alpha={self.alpha} must be above 0; use lora.rank={self.rank}, or twice that")
        if not self.targets:
            raise ValueError("lora.targets is empty; name linear layers of the encoder, such as '*.attention.q.*'")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class LoraLinear(nn.Linear):
    """A linear layer that takes over another one's weight and bias, with an adapter. It begins equal to that layer: the
    second factor is zero (section 4.1), and the first is uniform as in peft and in the paper's code."""

    def __init__(self, plain: nn.Linear, lora: Lora):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scale = plain.in_features, plain.out_features, lora.scale
        self.weight, self.bias = plain.weight, plain.bias
        down = torch.empty(lora.rank, self.in_features)
        if not down.is_meta:
            bound = 1 / math.sqrt(self.in_features)
            down.copy_(torch.empty(down.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound))
        self.lora_down = nn.Parameter(down)
        self.lora_up = nn.Parameter(torch.zeros(self.out_features, lora.rank))

    def forward(self, rows: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]"""
        return super().forward(rows) + self.scale * F.linear(F.linear(rows, self.lora_down), self.lora_up)


def is_adapter(name: str) -> bool:
    """Whether a tensor of this name is one of an adapter's two matrices."""
    return name.endswith((f".{DOWN}", f".{UP}"))


def add_adapters(encoder: nn.Module, lora: Lora) -> None:
    """Replaces, in place, the linear layers of `encoder` that `lora.targets` match by adapted ones. ValueError for a
    pattern that matches none."""
    linears = {f"{ENCODER}{name}": one for name, one in encoder.named_modules() if isinstance(one, nn.Linear)}
    chosen = [name for name in linears if any(fnmatch(name, pattern) for pattern in lora.targets)]
    for pattern in lora.targets:
        if not any(fnmatch(name, pattern) for name in linears):
            shown = next(reversed(linears), "none at all")
            raise ValueError(
                f"lora.targets={pattern!r} matches no linear layer of the encoder; names look like {shown!r}"
            )
    for name in chosen:
        parent, _, own = name.removeprefix(ENCODER).rpartition(".")
        setattr(encoder.get_submodule(parent), own, LoraLinear(linears[name], lora))


def merged(state: Mapping[str, Tensor], lora: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state without adapters, each added to its layer's weight, in fp32 whatever the weight's type. `lora`: at
    least rank and alpha, as in config.json. ValueError for an adapter that is incomplete or does not fit."""
    whole = {name: value for name, value in state.items() if not is_adapter(name)}
    try:
        scale = float(lora["alpha"]) / int(lora["rank"])
        for name in state:
            if name.endswith(f".{DOWN}"):
                layer = name.removesuffix(DOWN)
                added = state[f"{layer}{UP}"].float() @ state[name].float()
                whole[f"{layer}weight"] = whole[f"{layer}weight"].float() + scale * added
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"its adapters do not fit its weights ({error}); give weights that a stage wrote") from error
    return whole
