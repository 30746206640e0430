"""A directory of checkpoints: what is complete, what is damaged, what goes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pretrain.files import WRITING, move, sync, write_json

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
DELETING = ".deleting_"
# What a killed save leaves; an earlier version wrote into .saving_step_N.
LEFTOVERS = (f".step_*{WRITING}", f"{DELETING}step_*", ".saving_step_*")


def prepare(directory: Path, beside: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory)
    beside.mkdir()


def sweep(directory: Path) -> None:
    """Removes what a killed save left behind."""
    for pattern in LEFTOVERS:
        for leftover in directory.glob(pattern):
            log.info("removing the leftover %s of a save that did not end", leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def publish(body: dict[str, Any], beside: Path, final: Path) -> None:
    for folder in {(beside / name).parent for name in body["files"]} | {beside}:
        sync(folder)
    write_json(beside / MANIFEST, body | {"sha256": _hash_json(body)})
    if final.exists():  # the same step again, after its first copy was refused as damaged
        _remove(final)
    move(beside, final)


def prune(directory: Path, step: int, keep: int) -> None:
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


def complete(directory: Path) -> Iterator[tuple[str, dict]]:
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


def damage(path: Path, files: dict[str, dict]) -> list[str]:
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


def _step(path: Path) -> int:
    digits = path.name.removeprefix("step_")
    return int(digits) if digits.isascii() and digits.isdigit() else -1


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
