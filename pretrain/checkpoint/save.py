"""Save, verify and resume one stage; between stages it is pretrain/weights.py.

A checkpoint is a directory step_00000100 that was written as .step_00000100.writing beside its place: the whole model
(weights.safetensors), each rank's part of the optimizer's moments and its random state, all synced, then MANIFEST.json
with their sizes and hashes, then one rename. A directory without a valid manifest does not exist for `newest`, and a
file that the manifest does not list is not read. Nothing in it depends on the layout that wrote it: any other may go on
from there.

The hashes have no key: they show damage, a disk's or a copy's, but not intent. Whoever may write to the directory can
rewrite file and manifest together, and nothing here notices.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pretrain import files
from pretrain.checkpoint.directory import complete, damage, prepare, prune, publish, sweep
from pretrain.checkpoint.weights import WEIGHTS, HashedFile, SaveError, write_weights
from pretrain.distributed import fail_together, gather_objects, rank, world_size
from pretrain.parallel.engine import set_progress
from pretrain.parallel.moments import read_moments, write_moments

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh

log = logging.getLogger(__name__)

VERSION = 3  # of the manifest; 2: without the teacher in data_digest


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. `world` and `layout` are those of the run that wrote it."""

    step: int
    path: Path
    world: int
    layout: dict[str, int]
    files: tuple[str, ...]  # whose size and hash the manifest lists; anything else in `path` is not read
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS


def save(
    engine,
    directory: Path,
    step: int,
    *,
    weights: tuple[dict[str, torch.Tensor], dict[str, Any]],
    mesh: Mesh | None = None,
    keep: int = 2,
    recipe_hash: str = "",
    data_digest: str = "",
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write step_STEP into `directory` (seen by all nodes) and then remove all but the newest `keep` up to it.

    Every rank must call it. `weights` is (full_state, config) on rank 0; `extra` is JSON and comes back from `newest`.
    Raises SaveError on every rank when one cannot write, with the checkpoints before it left as they were.
    """
    final = directory / f"step_{step:08d}"
    beside = files.beside(final)
    try:
        fail_together(lambda: prepare(directory, beside) if rank() == 0 else None)
        fail_together(lambda: _see(beside))
        own = fail_together(lambda: _write_share(engine, mesh, beside))
        own |= fail_together(lambda: _write_weights(*weights, beside) if rank() == 0 else {})
        body = {
            "version": VERSION,
            "step": step,
            "world": world_size(),
            "layout": _layout(engine, mesh),
            "precision": _precision(engine),
            "recipe_hash": recipe_hash,
            "data_digest": data_digest,
            "extra": extra or {},
            "files": {name: entry for share in gather_objects(own) for name, entry in share.items()},
        }
        fail_together(lambda: publish(body, beside, final) if rank() == 0 else None)
    except OSError as error:
        if rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise SaveError(
            error.errno,
            f"step {step} could not be saved to {directory}: {error.strerror}; "
            "free space or repair that disk and start again, the checkpoints before this one are untouched",
        ) from error
    if rank() == 0:
        prune(directory, step, keep)
    return final


def newest(directory: Path, *, precision: str, recipe_hash: str = "", data_digest: str = "") -> Checkpoint | None:
    """The newest undamaged checkpoint of `directory`, or None; a damaged one is refused with one log line and the one
    before it is taken. Every rank must call it.

    Raises ValueError for one of another recipe, data or precision ("fp32", "bf16").
    """
    candidates: list[tuple[str, dict]] = []
    if rank() == 0:
        sweep(directory)
        candidates = list(complete(directory))
    now = {"recipe_hash": recipe_hash, "data_digest": data_digest, "precision": precision}
    for name, manifest in gather_objects(candidates)[0]:
        path = directory / name
        _check_same_run(path, manifest, now)
        names = sorted(manifest["files"])
        share = {key: manifest["files"][key] for key in names[rank() :: world_size()]}
        lines = [line for some in gather_objects(damage(path, share)) for line in some]
        if lines:
            log.warning("checkpoint refused: %s; trying the one before", lines[0])
            continue
        return Checkpoint(
            manifest["step"], path, manifest["world"], manifest["layout"], tuple(names), manifest["extra"]
        )
    log.info("no checkpoint to resume from in %s", directory)
    return None


def resume(engine, checkpoint: Checkpoint, mesh: Mesh | None = None) -> None:
    """Fill the engine's optimizer and counters and this rank's generators, before the first step. Its weights are those
    of `checkpoint.weights`, loaded before it was built. Every rank must call it."""
    read_moments(engine, mesh, [checkpoint.path / name for name in checkpoint.files if name.startswith("moments_rank")])
    set_progress(engine, checkpoint.step)
    layout = _layout(engine, mesh)
    if (checkpoint.world, checkpoint.layout) == (world_size(), layout):
        _set_random_state(checkpoint.path / f"random_rank{rank():05d}.pt")
        log.info("resumed from %s", checkpoint.path)
        return
    log.info(
        "resumed from %s, saved on %d ranks (%s), on %d ranks (%s): the same samples, the same losses to rounding",
        *(checkpoint.path, checkpoint.world, _spelled(checkpoint.layout), world_size(), _spelled(layout)),
    )


def newest_weights(directory: Path) -> tuple[int, Path] | None:
    """Step and weights.safetensors of the newest complete checkpoint in `directory`."""
    return next(((manifest["step"], directory / name / WEIGHTS) for name, manifest in complete(directory)), None)


# ---- one rank's share of a checkpoint


class _Writer:
    """Hashed, synced files, and errors kept till the end."""

    def __init__(self, root: Path):
        self.root = root
        self.files: dict[str, dict[str, Any]] = {}
        self.error: OSError | None = None

    def save(self, name: str, write: Callable[[HashedFile], None]) -> None:
        file = HashedFile(self.root / name)
        write(file)
        file.close()
        if file.error is not None and self.error is None:
            self.error = OSError(file.error.errno, file.error.strerror, str(self.root / name))
        self.files[name] = {"bytes": file.bytes, "sha256": file.digest.hexdigest()}


def _see(beside: Path) -> None:
    if not beside.is_dir():
        raise OSError(errno.ENOENT, "rank 0 made this directory and this rank does not see it: not shared", str(beside))


def _write_share(engine, mesh: Mesh | None, beside: Path) -> dict[str, dict]:
    writer = _Writer(beside)
    writer.save(f"moments_rank{rank():05d}.safetensors", lambda file: write_moments(engine, mesh, file))
    writer.save(f"random_rank{rank():05d}.pt", lambda file: torch.save(_random_state(), file))
    if writer.error is not None:
        raise writer.error
    return writer.files


def _write_weights(state: dict[str, torch.Tensor], config: dict[str, Any], beside: Path) -> dict[str, dict]:
    write_weights(state, beside / WEIGHTS, config)
    with open(beside / WEIGHTS, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {WEIGHTS: {"bytes": (beside / WEIGHTS).stat().st_size, "sha256": digest}}


def _random_state() -> dict[str, Any]:
    """This rank's generators, as what torch.load(weights_only=True) reads."""
    name, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state | {"numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest)}


def _set_random_state(path: Path) -> None:
    state = torch.load(path, weights_only=True)
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


# ---- the run


def _check_same_run(path: Path, manifest: dict, now: dict) -> None:
    ways_out = {
        "recipe_hash": "its model, trainable parameters, batch or optimizer settings differ; undo that change, or use "
        "another --run-dir with init_from",
        "data_digest": "the shards, text tokenizer or weights that it reads changed; put the same ones back, or use "
        "another --run-dir with init_from",
        "precision": "use a --ds JSON of that precision",
    }
    if manifest.get("version") not in (2, VERSION):
        raise ValueError(f"{path} was written by another version of this program; use another --run-dir")
    if manifest["version"] == 2:  # its digest knew no teacher
        parts = str(now["data_digest"]).split(" ")
        now = now | {"data_digest": " ".join(part for part in parts if not part.startswith("teacher:"))}
    for key, way_out in ways_out.items():
        if manifest.get(key) != now[key]:
            raise ValueError(f"{path} was saved with {key}={manifest.get(key)} and this run has {now[key]}: {way_out}")


def _precision(engine) -> str:
    return "bf16" if engine.bfloat16_enabled() else "fp32"


def _layout(engine, mesh: Mesh | None) -> dict[str, int]:
    """What decides which rank holds which part."""
    sizes = {} if mesh is None else {"tensor": mesh.tensor.size, "pipe": mesh.pipe.size, "sequence": mesh.sequence.size}
    return {"zero": int(engine.zero_optimization_stage()), **{name: size for name, size in sizes.items() if size > 1}}


def _spelled(layout: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in layout.items())
