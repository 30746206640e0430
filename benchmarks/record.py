"""What every benchmark writes down beside its figures, so that they can be measured again; and where it writes them."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def about(module: str, arguments: list[str] | None) -> dict[str, str]:
    """The command and the day. `arguments` None: those of this process."""
    words = ["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]
    return {"command": " ".join(words), "date": date.today().isoformat()}


def machine(*packages: str) -> dict[str, Any]:
    """Its cores, and the versions of Python and of the packages whose speed counts."""
    versions = {name: version(name) for name in packages}
    return {"cpu_cores": os.cpu_count(), "python": platform.python_version(), **versions}


def peak_bytes(usage: resource.struct_rusage | None = None) -> int:
    """The highest resident memory; None: this process's so far. Linux counts it in KiB, macOS in bytes."""
    usage = resource.getrusage(resource.RUSAGE_SELF) if usage is None else usage
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 2**10)


def write(results: dict[str, Any], out: Path | None, *, shown: bool = True) -> None:
    """As JSON, to the terminal and to `out`. Shown first: a disk that is full must not take what took hours."""
    text = json.dumps(results, indent=1)
    if shown:
        print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
