"""Counts what a server did, and writes it as Prometheus reads it (text format 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence

# Upper bounds of the histograms' buckets.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """How many values lie at or below each of `bounds`, and above the last."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, label: str) -> list[str]:
        """The histogram's lines in Prometheus' format; `label` is one such as path="/embed"."""
        total, lines = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            lines.append(f'{name}_bucket{{{label},le="{bound}"}} {total}')
        return [*lines, f"{name}_sum{{{label}}} {self.sum!r}", f"{name}_count{{{label}}} {total}"]


class Counts:
    """Requests by path and status, and passes through the model. Any number of threads may add to it. Callers give only
    paths that the server has, so that no client can make up a label."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: dict[tuple[str, int], int] = {}
        self._seconds: dict[str, Histogram] = {}
        self._items: dict[str, Histogram] = {}

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts one answered request."""
        with self._lock:
            self._requests[path, status] = self._requests.get((path, status), 0) + 1
            self._seconds.setdefault(path, Histogram(SECONDS)).add(seconds)

    def passed(self, kind: str, items: int) -> None:
        """Counts one pass through the model."""
        with self._lock:
            self._items.setdefault(kind, Histogram(ITEMS)).add(items)

    def text(self, now: Mapping[str, tuple[str, float]]) -> str:
        """All counts in Prometheus' format, with the gauges `now`: name -> (description, value)."""
        with self._lock:
            lines = _head("imglish_requests_total", "counter", "Answers by path and status.")
            lines += [
                f'imglish_requests_total{{path="{path}",status="{status}"}} {count}'
                for (path, status), count in sorted(self._requests.items())
            ]
            lines += _head("imglish_request_seconds", "histogram", "From a request's head to its answer.")
            for path, histogram in sorted(self._seconds.items()):
                lines += histogram.lines("imglish_request_seconds", f'path="{path}"')
            lines += _head("imglish_batch_items", "histogram", "Pictures or texts of a pass through the model.")
            for kind, histogram in sorted(self._items.items()):
                lines += histogram.lines("imglish_batch_items", f'kind="{kind}"')
        for name, (about, value) in now.items():
            lines += [*_head(name, "gauge", about), f"{name} {value!r}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, about: str) -> list[str]:
    return [f"# HELP {name} {about}", f"# TYPE {name} {kind}"]
