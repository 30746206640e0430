"""JSON from untrusted files: a value within bounds, or a ValueError that says why not.

Python's own parser fails in other ways too: by recursion for nested lists; and a number of 400 digits, or one where a
text should stand, fails only later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pretrain.files import open_regular

# Far above any file that this system writes; a manifest and annotations, which may be larger, have their own limits.
MAX_BYTES = 64 * 2**20
MAX_DEPTH, MAX_DIGITS = 64, 40

Wanted = TypeVar("Wanted")


def read_bytes(path: str | Path, limit: int = MAX_BYTES) -> bytes:
    """The content of a regular file. ValueError for anything else and for more than `limit` bytes; OSError."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if size > limit or len(data) > limit:
        raise ValueError(
            f"{path} has {max(size, len(data)):,} bytes, and at most {limit:,} are read; is it another file?"
        )
    return data


def read_json(path: str | Path, limit: int = MAX_BYTES) -> Any:
    """The value in a JSON file. ValueError, naming the file, if it is not JSON within the bounds; OSError if it cannot
    be read."""
    data = read_bytes(path, limit)
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or no JSON ({error})") from None


def read_object(path: str | Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """The object in a JSON file; errors as `read_json`, and ValueError if it holds another value."""
    content = read_json(path, limit)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_a(content)}, not a JSON object")
    return content


def parse_json(data: bytes | str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text. ValueError, saying why, for anything that is not JSON, is nested more than MAX_DEPTH
    deep, or has a whole number of more than MAX_DIGITS digits. `pairs`: json's object_pairs_hook."""
    try:
        value = json.loads(data, parse_int=_whole_number, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except UnicodeDecodeError:
        raise ValueError("not UTF-8 text") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _opened(data) > MAX_DEPTH:
        _check_depth(value)
    return value


_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"


def typed(content: Any, name: str, wanted: type[Wanted]) -> Wanted:
    """content[name], if it is of the type `wanted` (whole numbers must fit into 64 bits). ValueError otherwise."""
    if not isinstance(content, dict):
        raise ValueError(f"{_a(content)} stands where an object with {name} should")
    if name not in content:
        raise ValueError(f"it has no {name}")
    value: Any = content[name]
    if wanted is float and type(value) is int:
        value = float(value)
    too_large = type(value) is int and abs(value) >= 2**63
    if too_large or type(value) is not wanted:
        raise ValueError(f"{name} is {_a(value)}, not {_NAMES[wanted]}")
    return value


def fields(content: Any, kinds: Mapping[str, type]) -> dict[str, Any]:
    """`content`, if it is an object that has each of these fields with a value of its type. ValueError otherwise."""
    for name, kind in kinds.items():
        typed(content, name, kind)
    return content if isinstance(content, dict) else {}


def whole_numbers(content: dict[str, Any]) -> dict[str, int]:
    """`content`, if all its values are whole numbers. ValueError otherwise."""
    return fields(content, dict.fromkeys(content, int))


def read_fields(path: str | Path, kinds: Mapping[str, type], way_out: str) -> dict[str, Any]:
    """`fields` of a file; the ValueError names it and ends with the way out."""
    try:
        return fields(parse_json(read_bytes(path)), kinds)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({str(error).removeprefix(f'{path} ')}); {way_out}") from None


_NAMES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number of 64 bits",
    float: "a number",
    bool: "true or false",
}


def _a(value: Any) -> str:
    """What a value is, for a message; short values are shown themselves."""
    if value is None or isinstance(value, bool):
        return str(value)
    return _NAMES[type(value)] if isinstance(value, dict | list) else repr(value)[:40]


def _whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; at most {MAX_DIGITS} are read")
    return int(text)


def _opened(data: bytes | str) -> int:
    return data.count(b"[") + data.count(b"{") if isinstance(data, bytes) else data.count("[") + data.count("{")


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        parts = (part for each in level for part in (each.values() if isinstance(each, dict) else each))
        level = [part for part in parts if isinstance(part, dict | list)]
    if level:
        raise ValueError(_TOO_DEEP)
