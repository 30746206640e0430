"""The limits of what one server takes from its clients, and how it refuses what is over them."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

RETRY_AFTER = 1  # seconds after which a client may come again

# Commas, colons and opening brackets of a body: they bound how many values it holds, and so the memory of its objects.
MAX_MARKS = 20_000
HEAD_SECONDS = 10  # in which a connection must have sent the head of its request


class Refused(Exception):
    """Raised where a client gets an HTTP status and one sentence instead of a result."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """The options of pretrain.serve in the group limits. ValueError for one that is not above 0, and for a queue that
    is shorter than one request may be."""

    body: int = 8 * 2**20  # bytes of a request's body
    bodies: int = 256 * 2**20  # of all bodies that are held at a time
    pixels: int = 16 * 2**20  # of a picture
    pictures: int = 32  # of a request
    texts: int = 256  # of a request; names of classes are texts
    characters: int = 4096  # of a text
    queue: int = 512  # pictures and texts of all requests that are being worked on
    connections: int = 1024
    seconds: float = 30.0  # from a request's head to its answer
    body_seconds: float = 10.0  # from its head to the end of its body

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                flag = field.name.replace("_", "-")
                raise ValueError(
                    f"--{flag} {getattr(self, field.name)} must be above 0; the default is {field.default}"
                )
        if max(self.pictures, self.texts) > self.queue:
            least = f"--pictures {self.pictures} or --texts {self.texts}"
            raise ValueError(f"--queue {self.queue} is below {least}: such a request could never be taken; raise it")


class Deadline:
    """The moment from which an answer is of no use any more, `seconds` from now."""

    def __init__(self, seconds: float):
        self.begin = time.monotonic()
        self._end = self.begin + seconds

    def now(self) -> None:
        """Lets it pass at once: the client went away, or was refused."""
        self._end = self.begin

    def left(self) -> float:
        """Seconds until then; negative afterwards."""
        return self._end - time.monotonic()

    def check(self) -> None:
        """Raises Refused (504) where it has passed."""
        if self.left() <= 0:
            raise Refused(504, "the answer was not ready in time; send less at once, or later")
