"""A training step as it was before some of its gains, so that each can be measured alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from pretrain import layers
from pretrain.models.multiway import block
from pretrain.parallel import ds_config, engine


def _keep(*_: Any) -> None:
    """In place of skip_on_device: DeepSpeed's own way of skipping stays."""


def _no_section(config: dict[str, Any]) -> dict[str, Any]:
    return {}


def _never(rows: Any) -> bool:
    return False


# Gain -> (module, name, value that undoes it), for each of its parts.
GAINS: dict[str, list[tuple[Any, str, Any]]] = {
    "vocabulary": [(layers, "MULTIPLE", 1)],  # no rows that fill it up
    # DeepSpeed looks at every gradient on the host, and its timer waits for the device.
    "overflow": [(ds_config, "_bf16", _no_section), (ds_config, "PINNED", {}), (engine, "skip_on_device", _keep)],
    "fusing": [(block, "gains_by_fusing", _never)],  # a product each for queries, keys and values
}


@contextmanager
def without(gains: Sequence[str]) -> Iterator[None]:
    """Undoes `gains`, names of GAINS, for what is built and run inside."""
    with ExitStack() as stack:
        for gain in gains:
            for place, name, value in GAINS[gain]:
                stack.enter_context(patch.object(place, name, value))
        yield
