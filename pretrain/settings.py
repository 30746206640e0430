"""Typed changes to frozen configs from the command line: `optim.lr=1e-3`, `objectives.0.image_ratio=0.5`."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from difflib import get_close_matches
from typing import Any

LONGEST = 100  # characters of an old value that an error shows


def set_value(config: Any, key: str, text: str) -> Any:
    """A copy of `config` in which the field at the dotted `key` (fields, dict keys, tuple positions) is `text`, read as
    the field's type. Raises ValueError that names the key, and the nearest known one or the type wanted."""
    return _set(config, key.split("."), key, text, None)


def _set(config: Any, path: list[str], key: str, text: str, hint: Any) -> Any:
    if not path:
        return _read(text, hint, config, key)
    head, rest = path[0], path[1:]
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        hints = typing.get_type_hints(type(config))
        _expect(head, [f.name for f in dataclasses.fields(config)], key)
        value = _set(getattr(config, head), rest, key, text, hints[head])
        try:
            return dataclasses.replace(config, **{head: value})
        except ValueError as error:
            raise ValueError(f"--set {key}={text}: {error}") from None
    if isinstance(config, dict):
        _expect(head, list(config), key)
        return config | {head: _set(config[head], rest, key, text, Any)}
    if isinstance(config, tuple):
        _expect(head, [str(i) for i in range(len(config))], key)
        place = int(head)
        return (*config[:place], _set(config[place], rest, key, text, Any), *config[place + 1 :])
    raise ValueError(f"--set {key}: {'.'.join(key.split('.')[: -len(path)])} has no parts; there is no {head!r} in it")


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean X?' or '; known: ...', to end an error with the way out."""
    close = get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(set(known)))}"


def _expect(head: str, known: list[str], key: str) -> None:
    if head not in known:
        raise ValueError(f"--set {key}: there is no {head!r} here{nearest(head, known)}")


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
