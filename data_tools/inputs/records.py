"""Small JSON files that the tools write for themselves and for each other; somebody may have damaged them since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pretrain.json_files import read_object

_UNEXPECTED = (ValueError, RecursionError, KeyError, TypeError, AttributeError, OverflowError, AssertionError)


@contextmanager
def record(path: Path, way_out: str, what: str = "is damaged") -> Iterator[dict[str, Any]]:
    """The JSON object in a file. Raises ValueError ("PATH `what` (...); `way_out`") if it is none, and if the block
    finds that a key is missing or a value has another type; OSError if it cannot be read."""
    try:
        yield read_object(path)
    except _UNEXPECTED as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"{path} {what} ({why.splitlines()[0]:.200}); {way_out}") from None


def as_counts(value: Any) -> dict[str, int]:
    """`value` itself; raises TypeError unless it has a number of rows for each name."""
    if not isinstance(value, dict) or not all(type(n) is int and 0 <= n < 2**63 for n in value.values()):
        raise TypeError("its counts are no numbers")
    return value
