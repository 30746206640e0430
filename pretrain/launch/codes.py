"""The word `codes` in a chain of stages: a job of pretrain.encode_images, which stores the visual tokenizer's codes
beside the shards. The stages behind it then read them instead of running the tokenizer in each step.

The word is no stage. The stages behind it get the settings `mix.KIND.crops=N` and `mix.KIND.codes=codes` for each kind
whose pictures they mask. A stage that has begun goes on as it began.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpoint.weights import WEIGHTS, weights_digest
from pretrain.config import Recipe, Stage
from pretrain.data.codes import plain, stored_coding
from pretrain.data.shards.cache import is_remote
from pretrain.data.shards.manifest import load_manifest
from pretrain.recipes import load_recipe
from pretrain.run.directory import noted_identity
from pretrain.settings import fill_variables

WORD, CROPS = "codes", 4  # the word in a chain, and how many looks at each picture it means without a number
SCRIPT = "codes.sbatch"


class Storing(NamedTuple):
    """The job that stores codes: the directories of shards whose pictures it encodes, the tokenizer's weights, and the
    arguments of pretrain.encode_images."""

    directories: tuple[str, ...]
    tokenizer: str
    arguments: tuple[str, ...]


class Plan(NamedTuple):
    """What `codes` means for a chain. `settings`: for each stage behind it the values of --set."""

    settings: dict[str, list[str]]
    storing: Storing


def crops_of(word: str) -> int:
    """How many looks at each picture a word of a chain asks for, `codes` or `codes:N`; 0 for a stage's name. ValueError
    for a number that is none."""
    if word != WORD and not word.startswith(f"{WORD}:"):
        return 0
    number = word.partition(":")[2] or str(CROPS)
    if not re.fullmatch(r"[1-9]\d{0,3}", number):
        raise ValueError(f"{word} in the chain is wrong; write {WORD}, or {WORD}:N for N looks at each picture")
    return int(number)


def plan_codes(recipe: str, given: Sequence[str], run_dir: Path, behind: Sequence[str], crops: int) -> Plan:
    """The plan for the stages `behind` the word, with the settings `given` by the user. Raises ValueError where none of
    them masks pictures, and where they cannot share their codes."""
    settings: dict[str, list[str]] = {}
    directories: dict[Path, str] = {}  # one that has two names, such as images -> pairs, once
    shared: tuple[Recipe, str, Stage] | None = None
    for name in behind:
        whole, stage = load_recipe(recipe, name, list(given))
        kinds = _as_begun(run_dir / name, online(stage))
        if not kinds:
            continue
        settings[name] = [part for kind in kinds for part in (f"mix.{kind}.crops={crops}", f"mix.{kind}.codes={WORD}")]
        for place in (place for kind in kinds for place in _directories(kind, stage)):
            directories.setdefault(Path(place).resolve(), place)
        _check_same(shared, name, stage)
        shared = shared or (whole, name, stage)
    if shared is None:
        raise ValueError(
            f"{WORD} stands in the chain, but no stage behind it hides pictures and has yet to begin without stored "
            "codes; leave it out"
        )
    whole, name, stage = shared
    tokenizer = stage.visual_tokenizer or ""
    path = str(run_dir / tokenizer) if tokenizer in whole.stages else fill_variables(tokenizer, "visual_tokenizer")
    arguments = ["--tokenizer", path, "--crops", str(crops), "--recipe", recipe, "--stage", name]
    arguments += [word for setting in given for word in ("--set", setting)]
    places = tuple(directories.values())
    return Plan(settings, Storing(places, path, (*places, *arguments)))


def is_stored(storing: Storing, crops: int) -> bool:
    """Whether every directory has codes of this tokenizer, with `crops` looks at each picture."""
    weights = Path(storing.tokenizer)
    weights = weights / WEIGHTS if weights.is_dir() else weights
    if not weights.is_file():
        return False
    try:
        codings = [stored_coding(load_manifest(directory), WORD) for directory in storing.directories]
    except ValueError:
        return False
    return all(coding.tokenizer == weights_digest(weights) and coding.crops == crops for coding in codings)


def online(stage: Stage) -> list[str]:
    """The kinds of the stage's mix whose pictures are masked, and whose source could read stored codes but sets none:
    for them the visual tokenizer runs in each step."""
    masking = stage.masking
    if masking is None or "vision" not in stage.experts:
        return []
    silent = {kind: source for kind, source in stage.mix.items() if getattr(source, "codes", "") is None}
    return [kind for kind in silent if masking.ratios(kind)[0] and not getattr(silent[kind], "crops", 0)]


def _as_begun(directory: Path, kinds: list[str]) -> list[str]:
    """The kinds, or, for a stage that has begun, those with which it began to read stored codes."""
    noted = noted_identity(directory)
    return kinds if noted is None else [kind for kind in kinds if noted.get("mix", {}).get(kind, {}).get("codes")]


def _directories(kind: str, stage: Stage) -> list[str]:
    """The directories of a kind's shards. ValueError for one beside which codes cannot be stored."""
    shards = getattr(stage.mix[kind], "shards", ())
    places = [fill_variables(place, f"mix.{kind}") for place in ([shards] if isinstance(shards, str) else shards)]
    for place in places:
        if is_remote(place) or not Path(place).is_dir():
            raise ValueError(
                f"mix.{kind}.shards={place} is no directory of this file system, and codes are stored beside their "
                f"shards; leave {WORD} out of the chain: the tokenizer then runs in each step"
            )
    return places


def _check_same(first: tuple[Recipe, str, Stage] | None, name: str, stage: Stage) -> None:
    """Raises ValueError where the stage cannot read the codes that are stored for the first one."""
    if first is None:
        return
    _, other, before = first
    assert stage.transform is not None and before.transform is not None, "they have pictures"
    same = plain(stage.transform) == plain(before.transform) and stage.visual_tokenizer == before.visual_tokenizer
    if not same:
        raise ValueError(
            f"stages {other} and {name} have other transforms or visual tokenizers, and {WORD} stores one set of "
            f"codes; name {other} before it, or call python -m pretrain.encode_images with another --name"
        )
