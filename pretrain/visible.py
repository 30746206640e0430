"""Makes untrusted text (captions, keys, names of files and members, texts of exceptions) safe for a terminal."""

from __future__ import annotations

import logging
import sys

_JOINERS = "\u200c\u200d"  # they join emoji or separate letters; they cannot reverse or hide text


def visible(text: str) -> str:
    """The text with � for each control character: a terminal's escape codes, NUL, marks that reverse the direction of
    the text behind them, halves of a surrogate pair. Line breaks become spaces."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _JOINERS else " " if c.isspace() else "\ufffd" for c in text)


def say(text: object, *, error: bool = False) -> None:
    """print() for a line with untrusted text. `error`: to stderr."""
    print(visible(str(text)), file=sys.stderr if error else sys.stdout, flush=error)


class Formatter(logging.Formatter):
    """One line for each message, whatever it contains, and the lines of a traceback below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return visible(super().formatMessage(record))

    def formatException(self, ei) -> str:
        return "\n".join(map(visible, super().formatException(ei).splitlines()))


def start_logging(pattern: str = "%(asctime)s %(message)s") -> None:
    """Starts the log of a command, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Formatter(pattern, "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], force=True)
