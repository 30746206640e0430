"""Typed changes to frozen configs from the command line: `optim.lr=1e-3`, `objectives.0.image_ratio=0.5`."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
import typing
from difflib import get_close_matches
from typing import Any

from pretrain.json_files import parse_json

LONGEST = 100  # characters of an old value that an error shows


def set_values(config: Any, settings: dict[str, str]) -> Any:
    """A copy of `config` with new values: `settings` is {dotted key of fields, dict keys or tuple positions: text}, and
    each text is read as its field's type. All are set at once, since two changes may be valid only together. Raises
    ValueError that names the key, and the nearest known one or the wanted type."""
    return _change(config, _tree(settings), key="", hint=None)


def _tree(settings: dict[str, str]) -> dict[str, Any]:
    """{"optim.lr": "1", "optim.clip": "2"} -> {"optim": {"lr": "1", "clip": "2"}}."""
    tree: dict[str, Any] = {}
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
    return tree


def _change(value: Any, change: dict[str, Any] | str, *, key: str, hint: Any) -> Any:
    """`value`, at `key` and of the type `hint` (None: unknown), after `change`: a text to read, or the changes of its
    parts by name."""
    if isinstance(change, str):
        return _read(change, hint, value, key)
    parts, hints = _parts(value), {}
    if dataclasses.is_dataclass(value):
        hints = typing.get_type_hints(type(value))
    if parts is None:
        name = next(iter(change))
        raise ValueError(f"--set {_join(key, name)}: {key} has no parts; there is no {name!r} in it")
    new: dict[str, Any] = {}
    for name, own in change.items():
        if name not in parts:
            raise ValueError(f"--set {_join(key, name)}: there is no {name!r} here{nearest(name, list(parts))}")
        new[name] = _change(parts[name], own, key=_join(key, name), hint=hints.get(name))
    if isinstance(value, dict):
        return value | new
    if isinstance(value, tuple):
        return tuple((parts | new).values())
    try:
        return dataclasses.replace(value, **new)
    except ValueError as error:
        raise ValueError(f"--set {', '.join(_join(key, name) for name in new)}: {error}") from None


def _parts(value: Any) -> dict[str, Any] | None:
    """The parts of a value that can be set, by name; None for a value without parts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return value
    if isinstance(value, tuple):
        return {str(place): part for place, part in enumerate(value)}
    return None


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean X?' or '; known: ...', for the end of an error message."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(set(known)))}"


def near(count: int, multiple: int) -> str:
    """The multiples around `count`, for the end of an error message: "12 or 16", or only the one above if there is none
    below."""
    below = count // multiple * multiple
    return " or ".join(str(size) for size in (below, below + multiple) if size > 0)


def fill_variables(path: str, knob: str) -> str:
    """`path` with $VARIABLES replaced from the environment. Raises ValueError, naming `knob`, for one that is not
    set."""
    for name in re.findall(r"\$\{?([A-Za-z_]\w*)\}?", path):
        if name not in os.environ:
            raise ValueError(f"{knob}={path} uses ${name}, which is not set; export {name}=... or write the path")
    return os.path.expandvars(path)


def _read(text: str, hint: Any, old: Any, key: str) -> Any:
    """`text` as a value of the type `hint`, or of `old`'s type if there is no hint."""
    if hint in (None, Any):
        hint = type(old)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_union(hint) else (hint,)
    try:
        value = parse_json(text)
    except ValueError:
        value = {"True": True, "False": False, "None": None}.get(text, text)
    for choice in choices:
        try:
            return _as(value, text, choice)
        except TypeError:
            continue
        except ValueError as error:
            raise ValueError(f"--set {key}={_short(text)}: {error}") from None
    names = " or ".join(_name(choice) for choice in choices)
    raise ValueError(f"--set {key}={_short(text)}: wanted {names}; it is {_short(repr(old))} in the recipe")


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
        if number and abs(value) >= 2**63:
            raise ValueError("it is no whole number of 64 bits")
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
            plain = parse_json(part) if isinstance(part, str) else part
        except ValueError:
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
