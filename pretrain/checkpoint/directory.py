"""A directory of checkpoints: which are complete, which are damaged, which are pruned."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.files import WRITING, move, sha256_of, sync, write_json
from pretrain.json_files import fields, read_object

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
DELETING = ".deleting_"
# The leftovers of a killed save; an earlier version wrote into .saving_step_N.
LEFTOVERS = (f".step_*{WRITING}", f"{DELETING}step_*", ".saving_step_*")


def prepare(directory: Path, beside: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory)
    beside.mkdir()


def sweep(directory: Path) -> None:
    """Remove the leftovers of a killed save."""
    for pattern in LEFTOVERS:
        for leftover in directory.glob(pattern):
            log.info("removing %s, the leftover of an interrupted save", leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def publish(body: dict[str, Any], beside: Path, final: Path) -> None:
    for folder in {(beside / name).parent for name in body["files"]} | {beside}:
        sync(folder)
    write_json(beside / MANIFEST, body | {"sha256": _hash_json(body)})
    if final.exists():  # this step was saved before, and that copy was rejected as damaged
        _remove(final)
    move(beside, final)


def prune(directory: Path, step: int, keep: int) -> None:
    older = sorted((number, path) for path in directory.glob("step_*") if 0 <= (number := _step(path)) <= step)
    for _, path in older[: -max(keep, 1)]:
        try:
            _remove(path)
        except OSError as error:
            log.warning("cannot remove the old checkpoint %s: %s", path, error)


def _remove(path: Path) -> None:
    # Rename first: a half-removed directory must not look like a damaged checkpoint.
    doomed = path.with_name(DELETING + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def complete(directory: Path) -> Iterator[tuple[str, dict]]:
    """Name and manifest of each checkpoint, newest first."""
    for path in sorted(directory.glob("step_*"), key=_step, reverse=True):
        try:
            manifest = read_object(path / MANIFEST)
            digest = manifest.pop("sha256", None)
            if digest == _hash_json(manifest) and manifest.get("step") == _step(path):
                _check_types(manifest)
                yield path.name, manifest
                continue
            reason = "does not match its checksum"
        except (OSError, ValueError) as error:
            reason = f"cannot be read ({error})"
        log.warning("checkpoint rejected: %s %s; trying the previous one", path / MANIFEST, reason)


def _check_types(manifest: dict[str, Any]) -> None:
    """ValueError for a manifest that no save writes, though its checksum is right."""
    fields(manifest, {"step": int, "world": int, "layout": dict, "files": dict, "extra": dict})
    for entry in manifest["files"].values():
        fields(entry, {"bytes": int, "sha256": str})


def damage(path: Path, files: dict[str, dict]) -> list[str]:
    """One line for each of these files that differs from its manifest entry."""
    lines = []
    for name, entry in files.items():
        try:
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                lines.append(f"{path / name} has {size} bytes instead of {entry['bytes']}")
                continue
            if sha256_of(path / name) != entry["sha256"]:
                lines.append(f"{path / name} is damaged (its hash differs)")
        except OSError as error:
            lines.append(f"{path / name} cannot be read ({error.strerror})")
        except ValueError as error:
            lines.append(str(error))
    return lines


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
