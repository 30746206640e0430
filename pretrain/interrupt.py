"""Ctrl-C while a command imports its modules, which takes a second or more: one line instead of a traceback."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def quiet_imports() -> None:
    """Called in the __init__ of a package whose modules are commands, before anything that takes time. It acts only
    under `python -m`, where sys.argv[0] is "-m" until the module is located: a program that imports the package keeps
    its handler."""
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def imported() -> None:
    """Called when the imports are done: Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: object) -> NoReturn:
    os.write(2, b"stopped before the start\n")
    os._exit(130)
