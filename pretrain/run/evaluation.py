"""Which file an evaluation belongs into: eval.json for the stage's own, eval-NAME.json for one with other settings."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from pretrain.config import Recipe, Stage, to_json
from pretrain.data.shards.reader import load_manifest
from pretrain.run.continuation import inputs_dir
from pretrain.run.directory import read_json, read_recipe
from pretrain.run.identity import LOADING_ORDER, compare
from pretrain.run.inputs import text_tokenizer
from pretrain.run.stored_weights import input_digest

# What the numbers of an evaluation depend on, apart from the weights.
OF_STAGE = ("model", "experts", "objectives", "task", "visual_tokenizer", "transform", "evals")
OF_RECIPE = ("text_tokenizer", "seed", "loading")
OWN = "eval.json"
PICTURES = ("ImageShards", "LabelledShards")
TEXTS = ("PairShards", "CaptionShards", "TextShards", "QuestionShards", "TwoPictureShards", "ReferenceShards")
# Fields that were added later, with the value that means what was there before. The hash of an evaluation leaves out a
# field with this value, so that evaluations by earlier programs keep their hash.
LATER: dict[tuple[str, str], Any] = {
    ("MultiwayConfig", "final_norm"): True,
    ("MultiwayConfig", "ffn"): "per_modality",
    ("MultiwayConfig", "head_dim"): None,
    ("Pretrain", "weights"): {},
    ("Pretrain", "learned"): False,
    ("CaptionShards", "draw"): False,
    ("Probe", "attentive"): 0,
    ("Contrastive", "loss"): "softmax",
    ("Contrastive", "project"): True,
    ("Contrastive", "bias"): -10.0,
    ("Contrastive", "projection_bias"): False,
    ("Contrastive", "smoothing"): 0.0,
    ("MomentumContrast", "projection_bias"): False,
    ("MaskedData", "transform"): False,
    ("Matching", "alignment"): 0.0,
    ("Matching", "random_steps"): 0,
    ("Reasoning", "scale"): 0.001,
    ("CaptionScore", "more"): [],
    ("CaptionScore", "name"): "",
    ("Captioning", "tied_text_head"): False,
    ("Captioning", "transform"): False,
    ("ImageTransform", "rand_augment"): None,
    ("ImageTransform", "erase"): None,
    ("ImageTransform", "cover"): 1.0,
    ("LabelledShards", "balance"): 0.0,
    ("LabelledShards", "mixing"): None,
    **{(source, "weights"): [] for source in (*PICTURES, *TEXTS)},
    **{(source, "noise"): None for source in TEXTS},
    ("Retrieval", "folds"): 1,
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Asked:
    """An evaluation that is to be made, into the file `path`. `marks`: the hashes of what it reads, which the file
    holds too; `differs`: {dotted key: (the stage's own value, the value here)}; `pictures`: the directory for
    samples.json and samples/."""

    path: Path
    pictures: Path
    marks: dict[str, str]
    differs: dict[str, tuple[Any, Any]]

    @property
    def made(self) -> bool:
        """Whether its file holds this very evaluation already."""
        done = read_json(self.path)
        return all(done.get(key) == value for key, value in self.marks.items())


def asked_evaluation(
    directory: Path,
    stage_name: str,
    asked: tuple[Recipe, Stage],
    plain: Recipe,
    *,
    weights: str,
    given: bool,
    name: str,
) -> Asked:
    """The evaluation `asked` of the stage in `directory`, with the file that it goes to. The stage's own evaluation is
    the one in recipe.json or, if that has none, in `plain`, the recipe without this command's changes; no other one
    ever takes its place. `weights`: the digest of the weights; `given`: these are not the stage's own. `name`: the
    user's choice, or "". Raises ValueError for an unusable name, and for one that another evaluation has."""
    recipe, stage = asked
    noted = read_recipe(directory)
    inputs = inputs_dir(directory.parent, noted.get("identity"))
    if not _notes_evals(noted, stage_name):
        noted = to_json(plain)
    differs = differences(noted, stage_name, recipe, stage)
    marks = {"weights": weights, **_marks(recipe, stage, inputs)}
    own = read_json(directory / OWN)
    # An evaluation from before 2026-11-28 has no hash of its data: it is made again.
    changed = [key for key in ("data", "evals") if "data" in own and own.get(key) != marks[key]]
    if not differs and changed:
        differs = {changed[0]: (own.get(changed[0]), marks[changed[0]])}
    if not (differs or given or name):
        return Asked(directory / OWN, directory, marks, {})
    if name and not NAME.fullmatch(name):
        raise ValueError(f"--name={name!r} is not usable; use letters, digits, '.', '_' and '-', such as coco-5k")
    path = directory / f"eval-{name or _default_name(marks, bool(differs), given)}.json"
    there = read_json(path)
    keys = ("evals", "data", *(("weights",) if given else ()))
    if name and there and any(there.get(key) != marks[key] for key in keys):
        raise ValueError(f"--name={name}: {path} is another evaluation; choose another name, or remove it")
    return Asked(path, path.with_suffix(""), marks, differs)


def differences(noted: dict[str, Any], name: str, recipe: Recipe, stage: Stage) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (value then, value now)} for the settings that an evaluation's numbers depend on and that differ
    from `noted`, the content of recipe.json."""
    then = noted["stages"][name]
    changes: dict[str, tuple[Any, Any]] = {}
    for key, now in _parts(recipe, stage).items():
        if key == "model":
            compare(key, then.get(key) or noted.get(key), now, changes)
        elif key == "loading":
            loading = value if isinstance(value := noted.get(key), dict) else {}
            for part, value in now.items():
                compare(f"loading.{part}", loading.get(part, value), value, changes)
        else:
            compare(key, (then if key in OF_STAGE else noted).get(key), now, changes)
    return changes


def _parts(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    parts = {name: getattr(stage, name) for name in OF_STAGE} | {name: getattr(recipe, name) for name in OF_RECIPE}
    loading = {name: getattr(recipe.loading, name) for name in LOADING_ORDER}
    return parts | {"model": recipe.model_of(stage), "loading": loading}


def _notes_evals(noted: dict[str, Any], name: str) -> bool:
    stages = noted.get("stages")
    stage = stages.get(name) if isinstance(stages, dict) else None
    # Before 2026-11-28 a stage had no task, and its fields other names.
    return isinstance(stage, dict) and "task" in stage and bool(stage.get("evals"))


def _marks(recipe: Recipe, stage: Stage, run_dir: Path) -> dict[str, str]:
    inputs = [load_manifest(source.shards).digest for source in sources(stage.evals)]
    if (text := text_tokenizer(recipe, stage)) is not None:
        inputs.append(hashlib.sha256(text.path.read_bytes()).hexdigest())
    if stage.visual_tokenizer is not None:
        with suppress(ValueError):  # it may be missing if no evaluation needs codes
            inputs.append(input_digest(stage.visual_tokenizer, run_dir, "visual_tokenizer"))
    return {"evals": evals_hash(recipe, stage), "data": _hash(inputs)}


def evals_hash(recipe: Recipe, stage: Stage) -> str:
    """The hash of all settings that the numbers of the stage's evaluations depend on, apart from data and weights."""
    return _hash(_as_before(to_json(_parts(recipe, stage))))


def _as_before(value: Any) -> Any:
    """JSON values of configs without the fields of LATER that have the value listed there."""
    if isinstance(value, list):
        return [_as_before(each) for each in value]
    if not isinstance(value, dict):
        return value
    kind, missing = str(value.get("class")), object()
    kept = {name: each for name, each in value.items() if LATER.get((kind, name), missing) != each}
    return {name: _as_before(each) for name, each in kept.items()}


def sources(value: Any) -> Iterator[Any]:
    """The sources inside configs of evaluations, or in tuples and dictionaries of these, at any depth."""
    if hasattr(value, "shards"):
        yield value
        return
    inside: Any = ()
    if is_dataclass(value):
        inside = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, tuple | list):
        inside = value
    for each in inside:
        yield from sources(each)


def _default_name(marks: dict[str, str], differs: bool, given: bool) -> str:
    if given and not differs:
        return marks["weights"][:8]
    return _hash([marks["evals"], marks["data"], marks["weights"] if given else ""])[:8]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
