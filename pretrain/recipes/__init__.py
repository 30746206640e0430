"""Recipes, looked up by the name of a module here or by the path of a .py file, and changed by settings."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
import sys
import traceback
from dataclasses import fields, replace
from pathlib import Path

from pretrain.config import Recipe, Stage
from pretrain.settings import nearest, set_values

# Old names of fields -> where their settings are now, for the messages to whoever still writes them.
RENAMED = {
    "tokenizer": "model=VQKDConfig(...) with task=TrainTokenizer(...) of the stage",
    "teacher": "task=TrainTokenizer(teacher=...) of the stage, with Pixels(), Clip(DIR) or Encoder(WEIGHTS)",
    "model.drop_path": "drop_path of the stage",
    "model.activation_checkpointing": "activation_checkpointing of the stage",
    "model.image_codes": "image_codes of the objective MaskedData (--set objectives.0.image_codes=N)",
}


def load_recipe(name: str, stage: str, settings: list[str] | None = None) -> tuple[Recipe, Stage]:
    """The recipe `name` (a module of pretrain.recipes, or a .py file with RECIPE = Recipe(...)) and its stage, after
    `settings` such as optim.lr=1e-3. A key is looked up in the stage first, then in the recipe.

    Raises ValueError that names the unknown recipe, stage or key and the nearest known one.
    """
    recipe = find_recipe(name)
    if stage not in recipe.stages:
        raise ValueError(f"--stage {stage} is not in recipe {recipe.name}{nearest(stage, list(recipe.stages))}")
    of_stage, of_recipe = _sort_settings(settings or [], recipe.stages[stage])
    changed = set_values(recipe.stages[stage], of_stage) if of_stage else recipe.stages[stage]
    recipe = replace(recipe, stages=recipe.stages | {stage: changed})
    recipe = set_values(recipe, of_recipe) if of_recipe else recipe
    return recipe, recipe.stages[stage]


def _sort_settings(settings: list[str], stage: Stage) -> tuple[dict[str, str], dict[str, str]]:
    """({key: text} for the stage, the same for the recipe); the last one counts where a key is given twice. Raises
    ValueError for a setting without "=" and for an unknown key."""
    of_stage: dict[str, str] = {}
    of_recipe: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set {setting} has no '='; write --set KEY=VALUE, such as --set optim.lr=1e-3")
        head = key.split(".")[0]
        if new := RENAMED.get(key) or RENAMED.get(head):
            raise ValueError(f"--set {key}: that is now {new}")
        inherited = head == "model" and stage.model is None
        if head in {f.name for f in fields(Stage)} and not inherited:
            of_stage[key] = value
        elif head in {f.name for f in fields(Recipe)}:
            of_recipe[key] = value
        else:
            known = [f.name for f in (*fields(Stage), *fields(Recipe))]
            raise ValueError(f"--set {key}: neither the stage nor the recipe has {head!r}{nearest(head, known)}")
    return of_stage, of_recipe


def built_in_recipes() -> list[str]:
    """The names of the recipes here."""
    return [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]


def find_recipe(name: str) -> Recipe:
    """The recipe of a module here, or of a .py file, which is executed. Raises ValueError where there is none, and for
    whatever a file raises."""
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
            # A ValueError is most often a config's, whose message needs no name of a class.
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise ValueError(f"--recipe {name}, line {line}: {kind}{error}{_renamed(error)}") from error
    else:
        known = built_in_recipes()
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


def _renamed(error: BaseException) -> str:
    """The end of a message about a keyword that configs had once: where its setting is now; else ""."""
    keyword = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    new = [new for old, new in RENAMED.items() if keyword and old.split(".")[-1] == keyword[1]]
    return f"; that is now {new[0]}" if new else ""
