"""Save, verify and resume one stage; between stages it is pretrain/weights.py.

A checkpoint is a directory step_00000100 that was written as .saving_step_00000100 beside its place: every rank's files
(engine/, and each rank's random state), all synced, then MANIFEST.json with their sizes and hashes, then one rename. A
directory without a valid manifest does not exist for `restore`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from pretrain.distributed import rank, world_size
from pretrain.weights import WEIGHTS, HashedFile, SaveError, sync, write_json, write_weights

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
SAVING, DELETING = ".saving_", ".deleting_"
T = TypeVar("T")


@dataclass(frozen=True)
class Restored:
    step: int
    path: Path
    extra: dict[str, Any] = field(default_factory=dict)


def save(
    engine,
    directory: Path,
    step: int,
    *,
    keep: int = 2,
    recipe_hash: str = "",
    data_digest: str = "",
    extra: dict[str, Any] | None = None,
    weights: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None,
) -> Path:
    """Write step_STEP into `directory` (seen by all nodes) and then remove all but the newest `keep` up to it.

    Every rank must call it. `extra` is JSON and comes back from `restore`; `weights`, (state, config) on rank 0, go to
    weights.safetensors beside the engine's files, for evaluations of a run that is not over. Raises SaveError on every
    rank when one cannot write, with the checkpoints before it left as they were.
    """
    final = directory / f"step_{step:08d}"
    beside = directory / (SAVING + final.name)
    try:
        together(lambda: _prepare(directory, beside) if rank() == 0 else None)
        # By itself: DeepSpeed's save begins with a barrier, in which the others would wait for a rank that cannot.
        together(lambda: _see(beside))
        written = together(lambda: _write_share(engine, beside))
        if weights is not None:
            together(lambda: write_weights(weights[0], beside / WEIGHTS, weights[1]) if rank() == 0 else None)
        body = {
            "version": 1,
            "step": step,
            "world": world_size(),
            **_engine_kind(engine),
            "recipe_hash": recipe_hash,
            "data_digest": data_digest,
            "extra": extra or {},
            "files": {name: entry for share in written for name, entry in share.items()},
        }
        together(lambda: _publish(body, beside, final) if rank() == 0 else None)
    except SaveError as error:
        if rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        raise SaveError(
            error.errno,
            f"step {step} could not be saved to {directory}: {error.strerror}; "
            "free space or repair that disk and start again, the checkpoints before this one are untouched",
        ) from error
    if rank() == 0:
        _prune(directory, step, keep)
    return final


def restore(engine, directory: Path, *, recipe_hash: str = "", data_digest: str = "") -> Restored | None:
    """Load the newest undamaged checkpoint of `directory` into the engine and this rank's generators, or return None.

    Every rank must call it, before the first step. A damaged checkpoint is refused with one log line and the one before
    it is taken. Raises ValueError for one of another recipe, data, number of ranks, ZeRO stage or precision.
    """
    found: list[tuple[str, dict]] = []
    if rank() == 0:
        _sweep(directory)
        found = list(_complete(directory))
    found = _gather(found)[0]
    now = {
        "recipe_hash": recipe_hash,
        "data_digest": data_digest,
        "world": world_size(),
        **_engine_kind(engine),
    }
    for name, manifest in found:
        path = directory / name
        _check_same_run(path, manifest, now)
        names = sorted(manifest["files"])
        share = {key: manifest["files"][key] for key in names[rank() :: world_size()]}
        damage = [line for lines in _gather(_damage(path, share)) for line in lines]
        if damage:
            log.warning("checkpoint refused: %s; trying the one before", damage[0])
            continue
        engine.load_checkpoint(str(path), tag="engine")
        _set_random_state(path / f"random_rank{rank():05d}.pt")
        log.info("resumed from %s", path)
        return Restored(manifest["step"], path, manifest["extra"])
    log.info("no checkpoint to resume from in %s", directory)
    return None


def newest_weights(directory: Path) -> tuple[int, Path] | None:
    """Step and weights.safetensors of the newest complete checkpoint in `directory` that has one."""
    for name, manifest in _complete(directory):
        if (path := directory / name / WEIGHTS).is_file():
            return manifest["step"], path
    return None


# ---- one rank's share of a checkpoint


class _Writer:
    """Stands in for DeepSpeed's checkpoint engine while saving: hashed, synced files, and errors kept till the end."""

    def __init__(self, root: Path):
        self.root = root
        self.files: dict[str, dict[str, Any]] = {}
        self.error: OSError | None = None

    def save(self, state_dict, path: str | Path) -> None:
        file = HashedFile(Path(path))
        torch.save(state_dict, file)
        file.close()
        if file.error is not None and self.error is None:
            self.error = OSError(file.error.errno, file.error.strerror, str(path))
        name = Path(path).relative_to(self.root).as_posix()
        self.files[name] = {"bytes": file.bytes, "sha256": file.digest.hexdigest()}

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = self.error or error

    def create(self, info) -> None:
        pass

    def commit(self, info) -> bool:
        return True

    def is_decoupled(self) -> bool:
        return False

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def preserves_storage_sharing(self) -> bool:
        return True


def _see(beside: Path) -> None:
    if not beside.is_dir():
        raise OSError(errno.ENOENT, "rank 0 made this directory and this rank does not see it: not shared", str(beside))


def _write_share(engine, beside: Path) -> dict[str, dict]:
    writer = _Writer(beside)
    kept, script = engine.checkpoint_engine, getattr(engine, "_copy_recovery_script", None)
    # zero_to_fp32.py would be copied into each checkpoint, outside the writer; weights.safetensors replaces it.
    engine.checkpoint_engine, engine._copy_recovery_script = writer, lambda path: None
    try:
        engine.save_checkpoint(str(beside), tag="engine", save_latest=False)
    finally:
        engine.checkpoint_engine, engine._copy_recovery_script = kept, script
    writer.save(_random_state(), beside / f"random_rank{rank():05d}.pt")
    if writer.error is not None:
        raise writer.error
    return writer.files


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


# ---- the directory


def _prepare(directory: Path, beside: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _sweep(directory)
    beside.mkdir()


def _sweep(directory: Path) -> None:
    """Removes what a killed save left behind."""
    for prefix in (SAVING, DELETING):
        for leftover in directory.glob(f"{prefix}step_*"):
            log.info("removing the leftover %s of a save that did not end", leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def _publish(body: dict[str, Any], beside: Path, final: Path) -> None:
    for folder in {(beside / name).parent for name in body["files"]} | {beside}:
        sync(folder)
    write_json(beside / MANIFEST, body | {"sha256": _hash_json(body)})
    if final.exists():  # the same step again, after its first copy was refused as damaged
        _remove(final)
    os.rename(beside, final)
    sync(final.parent)


def _prune(directory: Path, step: int, keep: int) -> None:
    older = sorted((number, path) for path in directory.glob("step_*") if 0 <= (number := _step(path)) <= step)
    for _, path in older[: -max(keep, 1)]:
        try:
            _remove(path)
        except OSError as error:
            log.warning("the old checkpoint %s could not be removed: %s", path, error)


def _remove(path: Path) -> None:
    # Renamed first: a directory that is half removed must not look like a damaged checkpoint.
    doomed = path.with_name(DELETING + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _complete(directory: Path) -> Iterator[tuple[str, dict]]:
    """Name and manifest of each checkpoint, newest first."""
    for path in sorted(directory.glob("step_*"), key=_step, reverse=True):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            digest = manifest.pop("sha256")
            if digest == _hash_json(manifest) and manifest["step"] == _step(path):
                yield path.name, manifest
                continue
            reason = "is not what was written"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"cannot be read ({error})"
        log.warning("checkpoint refused: %s %s; trying the one before", path / MANIFEST, reason)


def _damage(path: Path, files: dict[str, dict]) -> list[str]:
    """One line for each of these files that is not what the manifest says."""
    lines = []
    for name, entry in files.items():
        try:
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                lines.append(f"{path / name} has {size} bytes instead of {entry['bytes']}")
                continue
            with open(path / name, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry["sha256"]:
                lines.append(f"{path / name} is not what was written (its hash differs)")
        except OSError as error:
            lines.append(f"{path / name} cannot be read ({error.strerror})")
    return lines


def _check_same_run(path: Path, manifest: dict, now: dict) -> None:
    world, before = now["world"], manifest["world"]
    ways_out = {
        "recipe_hash": "its model, trainable parameters, batch or optimizer settings differ; undo that change, or use "
        "another --run-dir with init_from",
        "data_digest": "the shards, text tokenizer or weights that it reads changed; put the same ones back, or use "
        "another --run-dir with init_from",
        "world": f"start {before} ranks instead of {world}, or use another --run-dir with init_from",
        "zero_stage": "use the --ds JSON of that ZeRO stage",
        "precision": "use a --ds JSON of that precision",
    }
    for key, way_out in ways_out.items():
        if manifest.get(key) != now[key]:
            raise ValueError(f"{path} was saved with {key}={manifest.get(key)} and this run has {now[key]}: {way_out}")


def _engine_kind(engine) -> dict[str, Any]:
    return {
        "zero_stage": int(engine.zero_optimization_stage()),
        "precision": "bf16" if engine.bfloat16_enabled() else "fp32",
    }


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---- all ranks take the same branch


def _gather(mine: T) -> list[T]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def together(action: Callable[[], T]) -> list[T]:
    """What `action` returned on each rank; SaveError on all ranks when it failed on one."""
    result, failure = None, None
    try:
        result = action()
    except OSError as error:
        failure = (error.errno or errno.EIO, f"{error.strerror or error} ({error.filename})")
    everyone = _gather((result, failure))
    for number, (_, failed) in enumerate(everyone):
        if failed is not None:
            raise SaveError(failed[0], f"rank {number}: {failed[1]}")
    return [outcome for outcome, _ in everyone]  # type: ignore[misc]
