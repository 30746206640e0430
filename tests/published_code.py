"""Others' published code beside ours: read from where an environment variable says, never copied. What it imports and
is not installed here (timm, pytorch_lightning, another transformers) stands in by a few lines that compute the same."""

from __future__ import annotations

import math
import os
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Stubs = Mapping[str, Mapping[str, Any]]  # a module's name -> what it holds


def place_of(variable: str, of: str, example: str) -> Path:
    """The directory that the environment variable names; else the test is skipped, with a word on how to run it."""
    if not (named := os.environ.get(variable)):
        pytest.skip(f"{of}'s own code is not part of this repository: {variable}={example} compares with it")
    return Path(named)


@contextmanager
def imported(place: Path, names: tuple[str, ...], stubs: Stubs, package: str) -> Iterator[list[Any]]:
    """The modules `names` below `place`, with `stubs` in the place of what they import. When it ends, the names mean
    again what they meant before; `package` is the top one of the modules that are read."""
    before = dict(sys.modules)
    for name, content in stubs.items():
        sys.modules[name] = module = types.ModuleType(name)
        module.__dict__.update(content)
    sys.path.insert(0, str(place))
    try:
        yield [import_module(name) for name in names]
    finally:
        sys.path.remove(str(place))
        for name in [name for name in sys.modules if name in stubs or name.split(".")[0] == package]:
            del sys.modules[name]
            if name in before:
                sys.modules[name] = before[name]


def timm() -> dict[str, dict[str, Any]]:
    """What both take from timm 0.4."""
    layers = {
        "DropPath": nn.Identity,  # never built: no rate here is above 0
        "to_2tuple": lambda value: (value, value),
        "trunc_normal_": nn.init.trunc_normal_,
    }
    return {
        "timm": {},
        "timm.models": {"create_model": None},
        "timm.models.layers": layers,
        "timm.models.registry": {"register_model": lambda build: build},
        "timm.models.vision_transformer": {"_cfg": dict, "PatchEmbed": PatchEmbed},
    }


class PatchEmbed(nn.Module):
    """Of timm: a convolution whose kernel is a patch, its outputs row by row."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.num_patches = (img_size // patch_size) ** 2
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


def away(model: nn.Module, seed: int, std: float = 0.1) -> None:
    """Moves every trained parameter from where it stands, so that a swapped one shows."""
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (value for value in model.parameters() if value.requires_grad):
            value.add_(torch.randn(value.shape, generator=made) * std)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad for name, value in model.named_parameters()
    }


def split_qkv(state: Mapping[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """Of a joined projection of queries, keys and values."""
    return {
        f"{ours}.{name}.shared.{theirs.rpartition('.')[2]}": part
        for name, part in zip("qkv", state[theirs].chunk(3), strict=True)
    }


def check_near(own: Mapping[str, Tensor], wanted: Mapping[str, Tensor], near: float = 1e-5) -> None:
    """Each tensor of `wanted` within `near` of ours, or of its largest number where that is above 1."""
    assert own and set(wanted) <= set(own), sorted(set(wanted) - set(own))
    for name, value in wanted.items():
        largest = max(1.0, value.abs().max().item())
        off = (own[name].reshape(value.shape) - value).abs().max().item() / largest
        assert math.isfinite(off) and off <= near, (name, off)
