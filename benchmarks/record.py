"""The facts that every benchmark records beside its figures, so that these can be reproduced."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import version
from typing import Any


def machine(*packages: str) -> dict[str, Any]:
    """The number of cores, and the versions of Python and of the packages that matter."""
    versions = {name: version(name) for name in packages}
    return {"cpu_cores": os.cpu_count(), "python": platform.python_version(), **versions}


def peak_bytes(usage: resource.struct_rusage | None = None) -> int:
    """The highest resident memory; None: this process's so far. Linux counts it in KiB, macOS in bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF) if usage is None else usage
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
