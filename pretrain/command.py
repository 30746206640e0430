"""How every command is asked, and how it ends: an exit code and at most one sentence, never a traceback."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from pathlib import Path
from typing import Any


def make_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """Of `python -m NAME`. `description`: its module's docstring; `example`: what stands behind the name."""
    command = f"python -m {name}"
    return argparse.ArgumentParser(
        prog=command,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: {command} {example}",
    )


def add_directories(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="holds 00000.tar, 00001.tar, ...")


def add_workers(parser: argparse._ActionsContainer, most: int = 8) -> None:
    """`most`: the default on a machine of many cores."""
    cores = min(most, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (%(default)s)")


def run(action: Callable[[], int | None], *, left: str) -> int:
    """The exit code of a command: what `action` returns (None: 0); 2 for wrong input (ValueError, OSError) and for a
    worker process that was killed; 130 for Ctrl-C. `left` says what became of the work so far. What is a fault of the
    program itself is raised, with its traceback."""
    try:
        return action() or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # torch's loader has no class of its own for a worker that is gone.
        if not isinstance(error, BrokenProcessPool) and "DataLoader worker" not in str(error):
            raise
        killed = "a worker process was killed, perhaps for want of memory; use fewer --workers"
        print(f"error: {killed} ({left})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {left}", file=sys.stderr)
        return 130


def about(module: str, arguments: list[str] | None) -> dict[str, str]:
    """The command and the day. `arguments` None: those of this process."""
    words = ["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]
    return {"command": " ".join(words), "date": date.today().isoformat()}


def write(results: dict[str, Any], out: Path | None, *, shown: bool = True) -> None:
    """As JSON, to the terminal and to `out`. Shown first: a disk that is full must not take what took hours."""
    text = json.dumps(results, indent=1)
    if shown:
        print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
