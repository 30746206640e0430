"""Tensors from files, checked before they become weights: nothing is rounded or reinterpreted silently."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# fp32, in which every model is built, holds each number of these exactly.
EXACT = (torch.float32, torch.bfloat16, torch.float16)


def check_type(where: object, name: str, stored: torch.dtype, wanted: torch.dtype = torch.float32) -> None:
    """ValueError if a conversion from `stored` to `wanted` would lose digits or meaning: float64, integers or bool
    where weights are wanted, and the reverse."""
    if stored == wanted or (wanted.is_floating_point and stored in EXACT):
        return
    have, want = (str(kind).removeprefix("torch.") for kind in (stored, wanted))
    raise ValueError(f"{where}: {name} holds {have} but must hold {want}; convert it, or give other weights")


def check_finite(where: object, name: str, value: Tensor) -> None:
    """ValueError for NaN and infinity."""
    if value.is_floating_point() and value.element_size() == 1:
        value = value.float()  # torch has no isfinite for float8
    if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{where}: {name} holds NaN or infinite numbers; the run that wrote it diverged, give others")


def load_tensors(module: nn.Module, state: Mapping[str, Tensor], where: object) -> None:
    """Fills every parameter and buffer of `module` from `state`, whose other tensors are ignored. ValueError, naming
    `where` and the tensor, for one that is missing or has another shape or type."""
    wanted = module.state_dict(keep_vars=True)
    for name, value in wanted.items():
        if name not in state:
            raise ValueError(f"{where} lacks {name}; the file is not whole, or its config is another model's")
        shape = getattr(value, "ds_shape", value.shape)  # of a parameter that ZeRO-3 split
        if state[name].shape != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(state[name].shape)} but its config says {tuple(shape)}")
        check_type(where, name, state[name].dtype, value.dtype)
    module.load_state_dict({name: state[name] for name in wanted})
