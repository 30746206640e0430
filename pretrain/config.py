"""Recipes: frozen dataclasses, composed from the small configs of the rooms below. Numbers live in recipes/."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import pkgutil
import sys
import traceback
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from pretrain.data.loader import Loading
from pretrain.data.masking import Masking
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.data.transforms import ImageTransform
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.optim import Optim
from pretrain.parallel.sizes import Parallel
from pretrain.settings import nearest, set_values

Source = ImageShards | PairShards | TextShards
KINDS = ("images", "pairs", "texts", "dual")
MAX_SEED = 2**48  # above that the kinds of a mix tell their random streams apart


@dataclass(frozen=True)
class BatchSize:
    """Sequences of each kind in one optimizer step, over all ranks; `accumulation` micro-steps share them."""

    images: int = 0
    pairs: int = 0
    texts: int = 0
    dual: int = 0  # pairs seen as an image and a text apart
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name, least in {**dict.fromkeys(KINDS, 0), "accumulation": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"batch.{name}={getattr(self, name)} is below {least}; use {least} or more")

    def counts(self) -> dict[str, int]:
        return {kind: count for kind in KINDS if (count := getattr(self, kind))}

    @property
    def total(self) -> int:
        return sum(self.counts().values())


@dataclass(frozen=True)
class Stage:
    """One run: its data, what it builds and trains, and where its weights come from."""

    mix: dict[str, Source]
    batch: BatchSize
    optim: Optim
    steps: int
    objectives: tuple[Any, ...] = ()
    experts: tuple[str, ...] = ("vision", "language", "fusion")
    trainable: tuple[str, ...] = ("*",)  # shell patterns over parameter names
    init_from: str | None = None  # a stage of this run directory, or a weights.safetensors
    tokenizer: VQKDConfig | None = None  # given: the stage trains this visual tokenizer and no encoder
    teacher: str = "pixels"  # of the tokenizer: pixels, a Hugging Face CLIP directory, or weights of ours
    visual_tokenizer: str | None = None  # makes the image targets: a stage of this run directory, or weights
    transform: ImageTransform = field(default_factory=ImageTransform)
    drop_path: float = 0.0
    activation_checkpointing: bool | int = 0  # see MultiwayConfig; True is 1
    parallel: Parallel = field(default_factory=Parallel)  # ranks that share one copy of the model
    compile: bool = False  # the blocks, by torch.compile; see models/compiled.py
    evals: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        wants = {"batch": BatchSize, "optim": Optim, "transform": ImageTransform, "parallel": Parallel}
        for name, wanted in wants.items():
            if not isinstance(getattr(self, name), wanted):
                raise ValueError(f"{name}={getattr(self, name)!r} is wrong; use {wanted.__name__}(...)")
        for kind in self.mix:
            if kind not in KINDS:
                raise ValueError(f"mix.{kind} is not a kind of data; use {', '.join(KINDS)}")
        asked, given = set(self.batch.counts()), set(self.mix)
        if asked != given:
            raise ValueError(
                f"batch asks for {sorted(asked)} but mix gives {sorted(given)}; "
                "every kind of the mix needs its batch size and the other way round"
            )
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        names = [objective.name for objective in self.objectives]
        if not self.tokenizer and not names:
            raise ValueError("the stage has no objectives; give at least one, or a tokenizer to train")
        if "contrastive" in names and (given != {"dual"} or self.batch.accumulation != 1):
            raise ValueError(
                f"contrastive needs a mix of dual alone and batch.accumulation=1 (mix={sorted(given)}, "
                f"accumulation={self.batch.accumulation}): its negatives are the whole step's batch"
            )
        for objective in self.objectives:
            if isinstance(objective, Masking) and not any(any(objective.ratios(kind)) for kind in given):
                raise ValueError(
                    f"objectives: {objective} hides nothing of the mix's {', '.join(sorted(given))}, so nothing could "
                    "be learned; set the ratio of one of them above 0"
                )


@dataclass(frozen=True)
class Recipe:
    """A model and the stages that pretrain it. The docstring of a recipe's module says where its numbers come from."""

    name: str
    model: MultiwayConfig
    stages: dict[str, Stage]
    text_tokenizer: str | None = None  # a SentencePiece model file; $VARIABLES are expanded
    seed: int = 0
    loading: Loading = field(default_factory=Loading)
    log_every: int = 10
    save_every: int = 1000
    keep: int = 2  # complete checkpoints to keep; the one before is used if the newest is damaged
    trace_samples: bool = False
    timeout_s: float = 1800.0  # so long a rank waits in a step for another one, or for its data, before it gives up

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep", "timeout_s"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; use 1 or more")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"seed={self.seed} is wrong; use a whole number from 0 to {MAX_SEED - 1}")


# What may change between two starts of one run without changing its numbers.
OPERATIONAL = ("log_every", "save_every", "keep", "trace_samples", "timeout_s")
OPERATIONAL_OF_STAGE = ("evals", "parallel", "activation_checkpointing", "compile")
LOADING_ORDER = ("streams", "block_shards", "skip_bad_shards")


def load_recipe(name: str, stage: str, settings: list[str] | None = None) -> tuple[Recipe, Stage]:
    """The recipe `name` (a module of pretrain.recipes, or a .py file with RECIPE = Recipe(...)) and its stage, after
    `settings` such as optim.lr=1e-3. A key is looked up in the stage first, then in the recipe.

    Raises ValueError that names the unknown recipe, stage or key and the nearest known one.
    """
    recipe = find_recipe(name)
    if stage not in recipe.stages:
        raise ValueError(f"--stage {stage} is not in recipe {recipe.name}{nearest(stage, list(recipe.stages))}")
    changes = {}
    for setting in settings or []:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting} has no '='; write --set KEY=VALUE, such as --set optim.lr=1e-3")
        head = key.split(".")[0]
        if head in {f.name for f in fields(Stage)}:
            key = f"stages.{stage}.{key}"
        elif head not in {f.name for f in fields(Recipe)}:
            known = [f.name for f in (*fields(Stage), *fields(Recipe))]
            raise ValueError(f"--set {key}: neither the stage nor the recipe has {head!r}{nearest(head, known)}")
        changes[key] = value  # given twice, the last one counts
    try:
        recipe = set_values(recipe, changes) if changes else recipe
    except ValueError as error:  # with the keys as they were given
        raise ValueError(str(error).replace(f"stages.{stage}.", "")) from None
    return recipe, recipe.stages[stage]


def find_recipe(name: str) -> Recipe:
    if name.endswith(".py") or "/" in name:
        path = Path(name)
        if not path.is_file() or path.suffix != ".py":
            raise ValueError(f"--recipe {name}: there is no such file that ends in .py")
        spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their own module up there
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            line = error.lineno if isinstance(error, SyntaxError) else _line(error, path)
            # A config says itself what is wrong with it: a ValueError needs no name.
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise ValueError(f"--recipe {name}, line {line}: {kind}{error}") from error
    else:
        room = importlib.import_module("pretrain.recipes")  # by name: it stands one floor higher
        known = [m.name for m in pkgutil.iter_modules(room.__path__) if not m.name.startswith("_")]
        if name not in known:
            raise ValueError(f"--recipe {name} is neither a recipe nor a .py file{nearest(name, known)}")
        module = importlib.import_module(f"pretrain.recipes.{name}")
    recipe = getattr(module, "RECIPE", None)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"--recipe {name} defines no RECIPE = Recipe(...)")
    return recipe


def _line(error: BaseException, path: Path) -> int | None:
    """The line of the file at `path` from which the error came."""
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if Path(frame.filename) == path.absolute()), None)


def to_json(config: Any) -> Any:
    """A config as plain JSON values, each dataclass with its class name, so that a reader can tell what it was."""
    if is_dataclass(config) and not isinstance(config, type):
        return {"class": type(config).__name__} | {f.name: to_json(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, dict):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_json(value) for value in config]
    return config


def identity_of(recipe: Recipe, stage: Stage) -> dict[str, Any]:
    """The settings that a run's numbers depend on, as plain JSON values, the stage's beside the recipe's."""
    whole = to_json(recipe)
    whole["loading"] = {key: whole["loading"][key] for key in LOADING_ORDER}
    own = {key: value for key, value in whole.items() if key not in (*OPERATIONAL, "stages", "name")}
    return own | {key: value for key, value in to_json(stage).items() if key not in OPERATIONAL_OF_STAGE}


def stage_hash(recipe: Recipe, stage: Stage) -> str:
    """Names what a checkpoint of this stage depends on; a run whose hash changed is another run."""
    return hashlib.sha256(json.dumps(identity_of(recipe, stage), sort_keys=True).encode()).hexdigest()[:16]
