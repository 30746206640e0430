"""A momentum teacher: a second encoder without gradient whose weights follow those of the trained one (MoCo, arXiv
1911.05722, 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

import torch
from torch import nn

TOGETHER = 32  # parameters that ZeRO-3 gathers at once
NO_ADAPTERS = "lora does not go with {}, whose momentum teacher has no adapters to follow with; leave one of them out"


class KeepsTypes(nn.Module):
    """Its buffers, and those of its submodules, keep their types when DeepSpeed casts the model to bf16: a buffer that
    moves by a two-hundredth of a difference would stand still in bf16."""

    def _apply(self, fn, recurse: bool = True):
        before = {id(module): dict(module._buffers) for module in self.modules()}
        super()._apply(fn, recurse)
        for module in self.modules():
            for name, value in before[id(module)].items():
                after = module._buffers[name]
                if value is not None and after is not None and after.dtype != value.dtype:
                    module._buffers[name] = value.to(after.device)
        return self


class Teacher(KeepsTypes):
    """Modules `parts` by name, freshly built. Their parameters become buffers, whole on every rank, so that neither the
    optimizer nor ZeRO nor freezing touches them, but a checkpoint holds them.

    Every rank has the same students after a step, so every rank moves its copy in the same way. `gathered`: as
    Layers.gathered."""

    def __init__(self, gathered: Callable[[Sequence[Any]], AbstractContextManager[Any]], **parts: nn.Module):
        super().__init__()
        self.gathered = gathered
        self.parts = nn.ModuleDict(parts)
        for module in self.parts.modules():
            for name, value in list(module._parameters.items()):
                if value is not None:
                    del module._parameters[name]
                    module.register_buffer(name, value.detach())

    @torch.no_grad()
    def follow(self, students: Mapping[str, nn.Module], share: float) -> None:
        """Moves every weight by `share` of the way to its student's; `students` have the names of `parts`. Every rank
        must call it: under ZeRO-3, whose ranks hold a part of each student, it is a collective."""
        own = dict(self.parts.named_buffers())
        theirs = ((f"{name}.{key}", p) for name, student in students.items() for key, p in student.named_parameters())
        pairs = iter([(own[name], value) for name, value in theirs])
        while some := list(islice(pairs, TOGETHER)):
            with self.gathered([value for _, value in some]):
                for weight, value in some:
                    if share == 1:
                        weight.copy_(value)
                    else:
                        weight.lerp_(value.to(weight.dtype), share)
