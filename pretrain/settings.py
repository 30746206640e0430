"""Typed changes to frozen configs from the command line: `optim.lr=1e-3`, `objectives.0.image_ratio=0.5`."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
import typing
from difflib import get_close_matches
from typing import Any

LONGEST = 100  # characters of an old value that an error shows


def set_values(config: Any, settings: dict[str, str]) -> Any:
    """A copy of `config` in which the field at each dotted key (fields, dict keys, tuple positions) is its text, read
    as the field's type. All at once: two changes may be valid only together. Raises ValueError that names the key, and
    the nearest known one or the type wanted."""
    tree: dict = {}
    for key, text in settings.items():
        *path, last = key.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
            if not isinstance(branch, dict):
                raise ValueError(f"--set {key}: {part!r} of it is set as a whole too; choose one")
        if isinstance(branch.get(last), dict):
            raise ValueError(f"--set {key}: parts of it are set too; choose one")
        branch[last] = text
    return _set(config, tree, "", None)


def _set(config: Any, changes: dict | str, key: str, hint: Any) -> Any:
    if isinstance(changes, str):
        return _read(changes, hint, config, key)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        hints = typing.get_type_hints(type(config))
        names = [f.name for f in dataclasses.fields(config)]
        parts = {n: _set(_part(config, n, names, key), c, _join(key, n), hints.get(n)) for n, c in changes.items()}
        try:
            return dataclasses.replace(config, **parts)
        except ValueError as error:
            raise ValueError(f"--set {', '.join(_join(key, name) for name in parts)}: {error}") from None
    if isinstance(config, dict):
        return config | {
            n: _set(_part(config, n, list(config), key), c, _join(key, n), Any) for n, c in changes.items()
        }
    if isinstance(config, tuple):
        names = [str(place) for place in range(len(config))]
        parts = {n: _set(_part(config, n, names, key), c, _join(key, n), Any) for n, c in changes.items()}
        return tuple(parts.get(name, value) for name, value in zip(names, config, strict=True))
    raise ValueError(
        f"--set {_join(key, next(iter(changes)))}: {key} has no parts; there is no {next(iter(changes))!r} in it"
    )


def _part(config: Any, name: str, known: list[str], key: str) -> Any:
    if name not in known:
        raise ValueError(f"--set {_join(key, name)}: there is no {name!r} here{nearest(name, known)}")
    if isinstance(config, tuple):
        return config[int(name)]
    return config[name] if isinstance(config, dict) else getattr(config, name)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean X?' or '; known: ...', to end an error with the way out."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(set(known)))}"


def near(count: int, multiple: int) -> str:
    """The multiples around `count`, to end an error: "12 or 16", or the one above where there is none below."""
    below = count // multiple * multiple
    return " or ".join(str(size) for size in (below, below + multiple) if size > 0)


def fill_variables(path: str, knob: str) -> str:
    """`path` with the environment's $VARIABLES in their places. Raises ValueError for one that is not set."""
    for name in re.findall(r"\$\{?([A-Za-z_]\w*)\}?", path):
        if name not in os.environ:
            raise ValueError(f"{knob}={path} uses ${name}, which is not set; export {name}=... or write the path")
    return os.path.expandvars(path)


def _read(text: str, hint: Any, old: Any, key: str) -> Any:
    """`text` as a value of the type `hint`, or of `old`'s type where there is no hint."""
    if hint in (None, Any):
        hint = type(old)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_union(hint) else (hint,)
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    for choice in choices:
        try:
            return _as(value, text, choice)
        except TypeError:
            continue
    names = " or ".join(_name(choice) for choice in choices)
    raise ValueError(f"--set {key}={text}: wanted {names}; it is {_short(repr(old))} in the recipe")


def _as(value: Any, text: str, wanted: Any) -> Any:
    origin = typing.get_origin(wanted) or wanted
    if origin is typing.Literal:
        if value in typing.get_args(wanted):
            return value
    elif origin is types.NoneType:
        if value is None:
            return None
    elif origin is bool:
        if isinstance(value, bool):
            return value
    elif origin is int:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if number and int(value) == value:
            return int(value)  # 1e6 steps is a fine way to write an int
    elif origin is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif origin is str:
        if isinstance(value, str):
            return value  # "x" in JSON's quotes is x
        if value is not None and not isinstance(value, list):
            return text
    elif origin is tuple:
        return _as_tuple(value, text, wanted)
    raise TypeError


def _as_tuple(value: Any, text: str, wanted: Any) -> tuple:
    parts = value if isinstance(value, list) else [part for part in text.strip("()").split(",") if part]
    kinds = [kind for kind in typing.get_args(wanted) if kind is not Ellipsis] or [str]
    if Ellipsis not in typing.get_args(wanted) and len(kinds) != len(parts):
        raise TypeError
    kinds = kinds * len(parts) if len(kinds) == 1 else kinds
    read = []
    for part, kind in zip(parts, kinds, strict=True):
        try:
            plain = json.loads(part) if isinstance(part, str) else part
        except json.JSONDecodeError:
            plain = part
        read.append(_as(plain, str(part).strip(), kind))
    return tuple(read)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union


def _name(wanted: Any) -> str:
    if typing.get_origin(wanted) is typing.Literal:
        return " or ".join(map(str, typing.get_args(wanted)))
    return "nothing (null)" if wanted is types.NoneType else getattr(wanted, "__name__", str(wanted))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
