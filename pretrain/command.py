"""What all commands share: their parser, and how they end, with an exit code and one sentence and not a traceback."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import re
import select
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from datetime import date
from pathlib import Path
from typing import Any

from pretrain.interrupt import imported
from pretrain.visible import Formatter, say

PATHS = {
    errno.ENOENT: "does not exist; check the path",
    errno.EISDIR: "is a directory; give a file",
    errno.ENOTDIR: "cannot be reached: a part of its path is a file; check the path",
    errno.EEXIST: "is in the way: a directory should stand there; give another path",
    errno.EACCES: "may not be read or written by this user; change its permissions, or give another path",
}

UNREAD = 141  # 128 + SIGPIPE, as of a program that this signal ends


def make_parser(name: str, description: str | None, example: str) -> argparse.ArgumentParser:
    """A parser for `python -m NAME`. `description`: the module's docstring; `example`: arguments after the name."""
    command = f"python -m {name}"
    return argparse.ArgumentParser(
        prog=command,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"example: {command} {example}",
    )


def add_directories(parser: argparse.ArgumentParser) -> None:
    """Adds the positional argument `directories`, one or more directories of shards."""
    parser.add_argument("directories", nargs="+", type=Path, metavar="DIR", help="contains 00000.tar, 00001.tar, ...")


def add_workers(parser: argparse._ActionsContainer, most: int = 8) -> None:
    """Adds --workers; `most`: the default on a machine with many cores."""
    cores = min(most, os.cpu_count() or 1)
    parser.add_argument("--workers", type=int, default=cores, metavar="N", help="processes (%(default)s)")


def part_of(text: str) -> tuple[int, int]:
    """--part I/N -> (I, N). ValueError for any other text."""
    part = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if part is None or int(part[1]) >= int(part[2]):
        raise ValueError(f"--part {text} is wrong; use 0/N to N-1/N, such as 0/8")
    return int(part[1]), int(part[2])


def run(action: Callable[[], int | None], *, state: str) -> int:
    """Runs `action` -> the exit code of a command: what it returns (None: 0); 2 for wrong input (ValueError, OSError)
    and for a worker process that was killed; 130 for Ctrl-C; 141 where nobody reads its output any more, as behind
    `| head`. `state` tells the user what became of the work so far. A bug's exception is raised, with its traceback."""
    imported()
    if logging.lastResort is not None:  # it prints the warnings of a command that does not start logging
        logging.lastResort.setFormatter(Formatter("%(message)s"))
    try:
        code = action() or 0
        print(end="", flush=True)  # what cannot be written is an error here, and not when the interpreter ends
        return code
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return UNREAD
        say(f"error: {sentence(error)}", error=True)
        return 2
    except RuntimeError as error:
        # In torch's words, as data/pool.py has them for workers that die again and again.
        if not isinstance(error, BrokenProcessPool) and not str(error).startswith("DataLoader worker (pid"):
            raise
        killed = "a worker process was killed, perhaps because memory ran out; use fewer --workers"
        print(f"error: {killed} ({state})", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; {state}", file=sys.stderr)
        return 130


def _nobody_reads() -> bool:
    """Whether the pipe behind stdout has lost its reader. If so, what is still printed goes nowhere."""
    try:
        out = sys.stdout.fileno()
    except (AttributeError, OSError):  # there is no stdout, or it is no file
        return False
    pipe = select.poll()
    pipe.register(out, 0)
    if not any(events & select.POLLERR for _, events in pipe.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, out)
    os.close(nowhere)
    return True


def sentence(error: Exception) -> str:
    """The sentence that a user reads about an error; for an OSError with a path, what is wrong with it and the way
    out."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in PATHS:
        return str(error)
    if error.strerror == os.strerror(error.errno):
        return f"{error.filename} {PATHS[error.errno]}"
    if error.errno == errno.ENOENT and str(error.strerror).startswith("could not be written"):  # of files.write_file
        return f"{error.filename} could not be written: its directory does not exist; make it, or give another path"
    return str(error)


def about(module: str, arguments: list[str] | None) -> dict[str, str]:
    """The command line and the date, for a result file. `arguments` None: those of this process."""
    words = ["python", "-m", module, *(sys.argv[1:] if arguments is None else arguments)]
    return {"command": " ".join(words), "date": date.today().isoformat()}


def write(results: dict[str, Any], out: Path | None, *, show: bool = True) -> None:
    """Writes JSON to the terminal and to `out`. The terminal comes first: a full disk must not cost hours of work."""
    text = json.dumps(results, indent=1)
    if show:
        print(text)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text + "\n")
