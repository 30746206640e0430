"""Saves, verifies and resumes one stage. The hand-over between stages is weights.py.

A checkpoint is a directory, step_00000100, which is first written as .step_00000100.writing: the whole model
(weights.safetensors), each rank's part of the optimizer's moments, and its random state, all synced; then MANIFEST.json
with their sizes and hashes; then one rename. `newest` ignores a directory without a valid manifest, and files that the
manifest does not list are not read. A run under any layout can resume from it.

The hashes have no key: they show damage by a disk or a copy, but not intent. Whoever can write to the directory can
rewrite a file and the manifest together, and nothing here notices.
"""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain import files
from pretrain.checkpoint.directory import Retention, complete, damage, place_of, prepare, prune, publish, sweep
from pretrain.checkpoint.snapshot import VERSION, layout_of, set_random_state, take_snapshot, write_snapshot
from pretrain.checkpoint.weights import WEIGHTS, SaveError, read_weights
from pretrain.distributed import fail_together, gather_objects, rank, world_size
from pretrain.files import open_safetensors
from pretrain.parallel.engine import set_progress
from pretrain.parallel.moments import read_average, read_moments

if TYPE_CHECKING:
    from pretrain.parallel.mesh import Mesh

log = logging.getLogger(__name__)

PLAIN = Retention()


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
    retention: Retention = PLAIN,
    recipe_hash: str = "",
    data_digest: str = "",
    extra: dict[str, Any] | None = None,
) -> Path:
    """Writes step_STEP into `directory` (shared by all nodes), then removes the checkpoints up to that step that
    `retention` does not keep.

    Every rank must call it. `weights` is (full_state, config) on rank 0; `extra` is JSON and comes back from `newest`.
    Raises SaveError on every rank if any rank cannot write; earlier checkpoints stay intact.
    """
    about = {"step": step, "recipe_hash": recipe_hash, "data_digest": data_digest, "extra": extra or {}}
    beside, final = begin(directory, step), place_of(directory, step)
    snapshot = take_snapshot(engine, mesh, about, weights)
    with together(directory, step):
        shares = gather_objects(fail_together(lambda: write_snapshot(snapshot, beside)))
        fail_together(lambda: publish(snapshot.about, shares, beside, final) if rank() == 0 else None)
    if rank() == 0:
        prune(directory, step, retention)
    return final


def begin(directory: Path, step: int) -> Path:
    """Makes the directory in which step_STEP will grow, the same for every rank. A collective. Raises SaveError on
    every rank."""
    beside = files.beside(place_of(directory, step))
    with together(directory, step):
        fail_together(lambda: prepare(directory, beside) if rank() == 0 else None)
        fail_together(lambda: _check_shared(beside))
    return beside


@contextmanager
def together(directory: Path, step: int) -> Iterator[None]:
    """Inside, every rank must raise the same OSError (`fail_together`). It becomes a SaveError, and the incomplete
    checkpoint is removed."""
    try:
        yield
    except OSError as error:
        if rank() == 0:
            shutil.rmtree(files.beside(place_of(directory, step)), ignore_errors=True)
        raise SaveError(
            error.errno,
            f"cannot save step {step} to {directory}: {error.strerror}; "
            "free some space or repair that disk, then start again; earlier checkpoints are intact",
        ) from error


def newest(
    directory: Path,
    *,
    precision: str,
    recipe_hash: str = "",
    data_digest: str = "",
    names_digest: str = "",
    step: int | None = None,
    own: bool = True,
) -> Checkpoint | None:
    """The newest undamaged checkpoint of `directory`, or that of `step`; None if there is none. A damaged one is
    logged, and the previous one tried. `own`: the directory is this run's own, so that leftovers of killed saves can be
    removed. Every rank must call it.

    Raises ValueError for a checkpoint of another recipe, data or precision ("fp32", "bf16"). `names_digest` is the
    data's digest as it was before shards had hashes.
    """
    candidates: list[tuple[str, dict]] = []
    if rank() == 0:
        if own:
            sweep(directory)
        candidates = [(name, manifest) for name, manifest in complete(directory) if step in (None, manifest["step"])]
    now = {"recipe_hash": recipe_hash, "data_digest": data_digest, "precision": precision}
    for name, manifest in gather_objects(candidates)[0]:
        path = directory / name
        _check_same_run(path, manifest, now, names_digest)
        names = sorted(manifest["files"])
        share = {key: manifest["files"][key] for key in names[rank() :: world_size()]}
        lines = [line for from_rank in gather_objects(damage(path, share)) for line in from_rank]
        if lines:
            log.warning("checkpoint rejected: %s; trying the previous one", lines[0])
            continue
        return Checkpoint(
            manifest["step"], path, manifest["world"], manifest["layout"], tuple(names), manifest["extra"]
        )
    log.info("no checkpoint to resume from in %s", directory)
    return None


def resume(engine, checkpoint: Checkpoint, mesh: Mesh | None = None) -> None:
    """Restores the engine's optimizer and counters and this rank's random generators, before the first step. The engine
    must have been built with the weights of `checkpoint.weights`. Every rank must call it."""
    read_moments(engine, mesh, [checkpoint.path / name for name in checkpoint.files if name.startswith("moments_rank")])
    set_progress(engine, checkpoint.step)
    layout = layout_of(engine, mesh)
    if (checkpoint.world, checkpoint.layout) == (world_size(), layout):
        set_random_state(torch.load(checkpoint.path / f"random_rank{rank():05d}.pt", weights_only=True))
        log.info("resumed from %s", checkpoint.path)
        return
    log.info(
        "resumed from %s, saved on %d ranks (%s), on %d ranks (%s): same samples, same losses up to rounding",
        *(checkpoint.path, checkpoint.world, _describe(checkpoint.layout), world_size(), _describe(layout)),
    )


def newest_weights(directory: Path) -> tuple[int, Path] | None:
    """Step and weights.safetensors of the newest complete checkpoint in `directory`; None if there is none."""
    return next(((manifest["step"], directory / name / WEIGHTS) for name, manifest in complete(directory)), None)


def average_in(path: Path) -> dict[str, Tensor]:
    """The running average in a complete checkpoint, whole, by name; {} if its stage keeps none. A tied head has one
    too, though the moments hold it under the table's name alone."""
    with open_safetensors(path / WEIGHTS) as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        average = read_average(sorted(path.glob("moments_rank*.safetensors")), shapes)
        for table in [name for name in average if name.endswith(".tokens.weight")]:
            for head in (name for name in shapes if name not in average and shapes[name] == shapes[table]):
                if file.get_tensor(head).equal(file.get_tensor(table)):
                    average[head] = average[table]
    return average


def read_trained(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As weights.read_weights, of what a stage has trained: of a checkpoint of a stage with ema the average, which is
    what the stage would hand over."""
    return read_weights(path, average_of(path))


def average_of(path: Path) -> dict[str, Tensor]:
    """`average_in` the checkpoint that `path` is, or is the weights of; {} for other weights."""
    place = path if path.is_dir() else path.parent
    saved = (path.is_dir() or path.name == WEIGHTS) and any(place.glob("moments_rank*.safetensors"))
    return average_in(place) if saved else {}


def _check_shared(beside: Path) -> None:
    if not beside.is_dir():
        reason = "rank 0 created this directory but this rank cannot see it, so the disk is not shared"
        raise OSError(errno.ENOENT, reason, str(beside))


# ---- the run


def _check_same_run(path: Path, manifest: dict, now: dict, names_digest: str) -> None:
    ways_out = {
        "recipe_hash": "its model, trainable parameters, batch or optimizer settings differ; undo that change, or use "
        "another --run-dir with init_from",
        "data_digest": "the shards, text tokenizer or weights that it reads changed; put the same ones back, or use "
        "another --run-dir with init_from",
        "precision": "use a --ds JSON of that precision",
    }
    if manifest.get("version") not in (2, 3, VERSION):
        raise ValueError(f"{path} was written by another version of this program; use another --run-dir")
    digests = [now["data_digest"], *([names_digest] if names_digest else [])]
    if manifest["version"] == 2:  # its digest has no teacher
        parts = [digest.split(" ") for digest in digests]
        digests = [" ".join(part for part in some if not part.startswith("teacher:")) for some in parts]
    # Until 2026-11-28 weights of other origin had no digest: "init_from:".
    for part in (part for part in str(manifest.get("data_digest")).split(" ") if part.endswith(":")):
        digests = [re.sub(rf"(?<!\S){re.escape(part)}\S+", part, digest) for digest in digests]
    if manifest.get("data_digest") in digests:
        now = now | {"data_digest": manifest["data_digest"]}
    for key, way_out in ways_out.items():
        if manifest.get(key) != now[key]:
            raise ValueError(f"{path} was saved with {key}={manifest.get(key)} and this run has {now[key]}: {way_out}")


def _describe(layout: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in layout.items())
