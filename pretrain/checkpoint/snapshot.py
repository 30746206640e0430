"""One rank's part of a checkpoint, which is first taken as a snapshot and then written.

The snapshot of a plain save holds the tensors themselves, and must be written before the next step. With `HostCopies`
it holds copies in host memory, so that training may go on while it is written.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint.weights import WEIGHTS, HashedFile, weights_entry, write_weights
from pretrain.distributed import rank, world_size
from pretrain.parallel.moments import Moments, own_moments, write_moments

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh

VERSION = 4  # of the manifest; version 3 hashed the weights' file as a whole, 2 had no teacher in data_digest


class HostCopies:
    """Host memory for the tensors of a snapshot. It is allocated for the first snapshot, and each later one overwrites
    it. For tensors on a GPU it is pinned, so that the copies run at the bus's speed."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def copy(self, name: str, value: Tensor) -> Tensor:
        """A copy of `value`, in the memory that belongs to `name`. From a GPU it is complete only after `wait`."""
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)

    def wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()

    @property
    def gib(self) -> float:
        return sum(buffer.nbytes for buffer in self._buffers.values()) / 2**30


class Snapshot(NamedTuple):
    """A rank's part of a checkpoint. `about`: the manifest without its files; `weights`: the whole model and its config
    on rank 0, None elsewhere."""

    about: dict[str, Any]
    moments: Moments
    random: dict[str, Any]
    weights: tuple[dict[str, Tensor], dict[str, Any]] | None


def take_snapshot(
    engine,
    mesh: Mesh | None,
    about: dict[str, Any],
    weights: tuple[dict[str, Tensor], dict[str, Any]],
    copies: HostCopies | None = None,
) -> Snapshot:
    """This rank's part of a checkpoint, now. `weights`: (full_state, config), used on rank 0 only. Not a collective."""
    about = {"version": VERSION, "world": world_size(), **about}
    about |= {"layout": layout_of(engine, mesh), "precision": precision_of(engine)}
    moments = own_moments(engine, mesh)
    if copies is not None:
        tensors = {name: copies.copy(name, value) for name, value in moments.tensors.items()}
        moments = moments._replace(tensors=tensors)
        copies.wait()
    return Snapshot(about, moments, random_state(), weights if rank() == 0 else None)


def write_snapshot(snapshot: Snapshot, place: Path) -> dict[str, dict[str, Any]]:
    """Writes and syncs this rank's files in the directory `place` -> their manifest entries by file name. Raises
    OSError."""
    files = {
        f"moments_rank{rank():05d}.safetensors": lambda file: write_moments(snapshot.moments, file),
        f"random_rank{rank():05d}.pt": lambda file: torch.save(snapshot.random, file),
    }
    entries = {name: _write_hashed(place / name, write) for name, write in files.items()}
    if snapshot.weights is not None:
        state, config = snapshot.weights
        digest = write_weights(state, place / WEIGHTS, config)
        entries[WEIGHTS] = weights_entry(place / WEIGHTS, digest)
    return entries


def _write_hashed(path: Path, write: Callable[[HashedFile], None]) -> dict[str, Any]:
    file = HashedFile(path)
    write(file)
    file.close()
    if file.error is not None:
        raise OSError(file.error.errno, file.error.strerror, str(path))
    return {"bytes": file.bytes, "sha256": file.digest.hexdigest()}


def precision_of(engine) -> str:
    """The precision that a checkpoint notes: bf16 or fp32."""
    return "bf16" if engine.bfloat16_enabled() else "fp32"


def layout_of(engine, mesh: Mesh | None) -> dict[str, int]:
    """The sizes that decide which rank holds which part of the state."""
    sizes = {} if mesh is None else {"tensor": mesh.tensor.size, "pipe": mesh.pipe.size, "sequence": mesh.sequence.size}
    return {"zero": int(engine.zero_optimization_stage()), **{name: size for name, size in sizes.items() if size > 1}}


def random_state() -> dict[str, Any]:
    """The state of this rank's generators, in types that torch.load(weights_only=True) accepts."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state | {"numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)}


def set_random_state(state: dict[str, Any]) -> None:
    """Sets this rank's generators to a state that `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
