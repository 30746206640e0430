"""What the commands here have in common: how they are asked, and how they end.

They end with an exit code and at most one sentence, never with a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path


def make_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """Of `python -m data_tools.NAME`. `description`: its module's docstring; `example`: what stands behind the name."""
    command = f"python -m data_tools.{name}"
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
