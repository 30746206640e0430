"""A run's identity: the settings that its numbers depend on, which decide whether two starts are of the same run.

It is written into recipe.json at the first start and stays. A later program that knows more fields goes on under it as
long as it would compute the same; checkpoints carry its hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, Field, fields, is_dataclass, replace
from typing import Any

from pretrain.config import Recipe, Stage, to_json
from pretrain.data.transforms import ImageTransform

# What may change between two starts of one run without changing its numbers.
OPERATIONAL = (
    *("log_every", "save_every", "keep", "keep_every", "save_in_background", "copy_every"),
    *("trace_samples", "max_skipped_steps", "rollback", "profile_steps", "timeout_s"),
    *("tf32", "deterministic"),  # they change rounding only, like the precision in the DeepSpeed JSON
)
OPERATIONAL_OF_STAGE = (
    *("evals", "evals_every", "best", "patience"),
    *("parallel", "activation_checkpointing", "compile"),
)
LOADING_ORDER = ("streams", "block_shards", "skip_bad_shards")
CONTINUES = "continues"  # in the identity of a run that goes on where another one stopped; see continuation.py


def identity_of(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The settings that a run's numbers depend on, as plain JSON values."""
    return to_json(_parts(recipe, stage))


def hash_of(identity: dict[str, Any]) -> str:
    """16 hex digits that are equal for equal identities."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def stage_hash(recipe: Recipe, stage: Stage) -> str:
    """The hash of the identity of a run that starts now."""
    return hash_of(identity_of(recipe, stage))


def differences(noted: dict[str, Any], recipe: Recipe, stage: Stage) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value then, value now)} of all settings that differ from a noted identity. A field that is not in
    it, because an earlier program wrote it, counts as having its default."""
    noted = _modern(noted)
    if as_begun(stage, noted) is not stage:
        stage, noted = as_begun(stage, noted), noted | {"transform": noted["transform"] | {"antialias": False}}
    defaults = {f.name: default for f in fields(Stage) if (default := _default(f)) is not MISSING}
    changes: dict[str, tuple[Any, Any]] = {}
    parts = _parts(recipe, stage)
    for name in sorted(parts.keys() | noted.keys()):
        if name in (*OPERATIONAL_OF_STAGE, CONTINUES, "class"):
            continue
        compare(name, noted.get(name, to_json(defaults.get(name))), parts.get(name), changes)
    return changes


def as_begun(stage: Stage, noted: dict[str, Any]) -> Stage:
    """The stage with antialias=False if the noted identity does not know the field: its run began before there was
    antialiasing, and must go on seeing the same pixels."""
    transform = noted.get("transform")
    if stage.transform is None or not isinstance(transform, dict) or "antialias" in transform:
        return stage
    return replace(stage, transform=replace(stage.transform, antialias=False))


def _parts(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    own = {f.name: getattr(recipe, f.name) for f in fields(Recipe) if f.name not in (*OPERATIONAL, "stages", "name")}
    own["loading"] = {name: getattr(recipe.loading, name) for name in LOADING_ORDER}
    of_stage = {f.name: getattr(stage, f.name) for f in fields(Stage) if f.name not in OPERATIONAL_OF_STAGE}
    if stage.transform is not None:
        of_stage["transform"] = replace(
            stage.transform, evaluation=ImageTransform.evaluation
        )  # evals are no part of it
    return own | of_stage | {"model": recipe.model_of(stage)}


def compare(key: str, then: Any, now: Any, changes: dict[str, tuple[Any, Any]]) -> None:
    """Puts {dotted key: (then, now)} into `changes` wherever `now`, a config or a part of one, differs from the noted
    JSON value `then`. A field of `now` that is missing in `then` counts as having its default there."""
    if is_dataclass(now) and isinstance(then, dict) and then.get("class") == type(now).__name__:
        known = {f.name: f for f in fields(now)}
        for name, f in known.items():
            compare(f"{key}.{name}", then.get(name, to_json(_default(f))), getattr(now, name), changes)
        for name in then.keys() - known.keys() - {"class"}:
            changes[f"{key}.{name}"] = then[name], None
    elif isinstance(now, dict) and isinstance(then, dict):
        for name in sorted(now.keys() | then.keys()):
            compare(f"{key}.{name}", then.get(name), now.get(name), changes)
    elif isinstance(now, tuple | list) and isinstance(then, list) and len(now) == len(then):
        for place, (before, after) in enumerate(zip(then, now, strict=True)):
            compare(f"{key}.{place}", before, after, changes)
    elif then != (plain := to_json(now)):
        changes[key] = then, plain


def _default(f: Field) -> Any:
    return f.default if f.default_factory is MISSING else f.default_factory()


def _modern(noted: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run that began before 2026-11-28, in today's terms. At that time the visual tokenizer was a
    field of the stage, its teacher a string, the image head's size a field of the model, and the model had two fields
    without effect."""
    if "teacher" not in noted:
        return noted
    now = {name: value for name, value in noted.items() if name not in ("tokenizer", "teacher")}
    if noted.get("tokenizer"):
        return now | {"model": noted["tokenizer"], "task": _training(str(noted["teacher"]))}
    gone = ("image_codes", "drop_path", "activation_checkpointing")
    model = {name: value for name, value in noted["model"].items() if name not in gone}
    codes = {"image_codes": noted["model"]["image_codes"]}
    objectives = [each | (codes if each["class"] == "MaskedData" else {}) for each in noted["objectives"]]
    return now | {"model": model, "objectives": objectives}


def _training(teacher: str) -> dict[str, Any]:
    """The task of a stage that trained a visual tokenizer, from that time's name of its teacher."""
    if teacher == "pixels":
        config: dict[str, Any] = {"class": "Pixels", "cells": 4}
    elif teacher.startswith("clip:"):
        config = {"class": "Clip", "directory": teacher.removeprefix("clip:")}
    else:
        config = {"class": "Encoder", "weights": teacher}
    return {"class": "TrainTokenizer", "teacher": config}
