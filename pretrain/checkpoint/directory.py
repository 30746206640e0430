"""A directory of checkpoints: which are complete, which are damaged, which may be removed."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.weights import matches_entry
from pretrain.files import WRITING, move, sha256_of, sync, write_json
from pretrain.json_files import fields, read_object

log = logging.getLogger(__name__)

MANIFEST = "MANIFEST.json"
DELETING = ".deleting_"
# The leftovers of a killed save; an earlier version wrote into .saving_step_N.
LEFTOVERS = (f".step_*{WRITING}", f"{DELETING}step_*", ".saving_step_*")


def prepare(directory: Path, beside: Path) -> None:
    """Makes the directory `beside`, in which a checkpoint of `directory` will grow, and sweeps."""
    directory.mkdir(parents=True, exist_ok=True)
    sweep(directory)
    beside.mkdir()


def sweep(directory: Path) -> None:
    """Removes the leftovers of killed saves."""
    for pattern in LEFTOVERS:
        for leftover in directory.glob(pattern):
            log.info("removing %s, the leftover of an interrupted save", leftover)
            shutil.rmtree(leftover, ignore_errors=True)


def place_of(directory: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return directory / f"step_{step:08d}"


def publish(about: dict[str, Any], shares: list[dict[str, dict]], beside: Path, final: Path) -> None:
    """Turns `beside`, in which every rank has written and synced its files, into the checkpoint `final`. `about`: the
    manifest without its files; `shares`: each rank's manifest entries by file name. Raises OSError."""
    body = about | {"files": {name: entry for share in shares for name, entry in share.items()}}
    for folder in {(beside / name).parent for name in body["files"]} | {beside}:
        sync(folder)
    write_json(beside / MANIFEST, body | {"sha256": _hash_json(body)})
    if final.exists():  # this step was saved before, and that copy was rejected as damaged
        _remove(final)
    move(beside, final)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: the newest `last`, those of every `every`-th step (0: none), and the steps in `best`."""

    last: int = 2
    every: int = 0
    best: frozenset[int] = frozenset()

    def stays(self, step: int) -> bool:
        """Whether the checkpoint of `step` stays even if it is not among the newest."""
        return step in self.best or (self.every > 0 and step % self.every == 0)


def best_step(history: Mapping[int, Mapping[str, Any]], best: str) -> int | None:
    """The first step of `history`, {step: figures}, with the highest value of the figure `best`, or with the lowest if
    `best` begins with "-"; None if no step has the figure."""
    name, sign = best.removeprefix("-"), -1.0 if best.startswith("-") else 1.0
    values: dict[int, Any] = {step: figures.get(name) for step, figures in history.items()}
    numbers = {step: value for step, value in values.items() if type(value) in (int, float) and math.isfinite(value)}
    known = {step: sign * value for step, value in numbers.items()}
    return max(known, key=lambda step: (known[step], -step)) if known else None


def prune(directory: Path, step: int, retention: Retention) -> None:
    """Removes the checkpoints up to `step`, the newest of this run, that `retention` does not keep."""
    older = sorted((number, path) for path in directory.glob("step_*") if 0 <= (number := _step(path)) <= step)
    for number, path in older[: -max(retention.last, 1)]:
        if retention.stays(number):
            continue
        try:
            _remove(path)
        except OSError as error:
            log.warning("cannot remove the old checkpoint %s: %s", path, error)


def drop_beyond(directory: Path, step: int) -> None:
    """Removes the checkpoints of later steps, the newest first. OSError if one cannot be removed."""
    later = [path for path in directory.glob("step_*") if _step(path) > step]
    for path in sorted(later, key=_step, reverse=True):
        log.info("removing %s: the run goes back to step %d", path, step)
        _remove(path)
    if later:
        sync(directory)


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
    """ValueError for a manifest that no save writes, even though its checksum is right."""
    fields(manifest, {"step": int, "world": int, "layout": dict, "files": dict, "extra": dict})
    for entry in manifest["files"].values():
        fields(entry, {"bytes": int, "sha256": str})


def damage(path: Path, files: dict[str, dict]) -> list[str]:
    """One line for each of these files of the checkpoint `path` that differs from its manifest entry."""
    lines = []
    for name, entry in files.items():
        try:
            if (size := (path / name).stat().st_size) != entry["bytes"]:
                lines.append(f"{path / name} has {size} bytes instead of {entry['bytes']}")
                continue
            # Until 2026-11-28 the weights' entry had the hash of the whole file, as the other files' entries still do.
            whole = "header" not in entry
            if not (sha256_of(path / name) == entry["sha256"] if whole else matches_entry(path / name, entry)):
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
