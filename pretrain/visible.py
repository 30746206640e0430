"""Text from outside (captions, keys, names of files and members, texts of exceptions) on its way to a screen."""

from __future__ import annotations

import logging
import sys

_JOINERS = "\u200c\u200d"  # they join emoji and part letters; no text turns around or disappears by them


def visible(text: str) -> str:
    """The text with � for each character that steers instead of being shown: a terminal's escape codes, NUL, marks that
    turn the direction of what follows, halves of a surrogate pair. Line breaks become spaces."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS else " " if c.isspace() else "\ufffd" for c in text)


def say(text: object, *, error: bool = False) -> None:
    """print() for a line with text from outside. `error`: to stderr."""
    print(visible(str(text)), file=sys.stderr if error else sys.stdout, flush=error)


class Formatter(logging.Formatter):
    """One line for each message, whatever is in it; the lines of a traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return visible(super().formatMessage(record))

    def formatException(self, ei) -> str:
        return "\n".join(map(visible, super().formatException(ei).splitlines()))


def start_logging(pattern: str = "%(asctime)s %(message)s") -> None:
    """The log of a command, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(pattern, "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], force=True)
