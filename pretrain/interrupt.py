"""Ctrl-C while a command's modules are being imported, a second or more: one line instead of a traceback."""

from __future__ import annotations

import os
import signal
import sys
from typing import NoReturn


def quiet_imports() -> None:
    """For the __init__ of a package whose modules are commands, before anything that takes time. Only under
    `python -m`, which says "-m" until it has found the module: whoever imports the package keeps his handler."""
    if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def imported() -> None:
    """Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(number: int, frame: object) -> NoReturn:
    os.write(2, b"stopped before the start\n")
    os._exit(130)
