"""restarts.jsonl in a stage's directory: a line for each time that its ranks failed, with what the job did then.

The report and the status page read it too. This file does not import torch, which takes longer than everything that a
job script decides with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.json_files import parse_json, read_bytes, typed

RESTARTS = "restarts.jsonl"
HOW = {"again": "in place", "requeue": "by the queue"}  # the other action: end


@dataclass(frozen=True)
class Restart:
    """One failure of a stage's ranks."""

    time: float  # seconds since 1970
    job: str
    code: int  # the exit code
    reached: int  # the last step that any life so far had done
    action: str  # again (in place), requeue or end
    node: str  # the node that the first error names, or ""
    first: str  # the error that came first

    def __str__(self) -> str:
        how = f"started again {HOW[self.action]}" if self.action in HOW else "the job ended"
        return f"{how} at step {self.reached:,}: {self.first or f'exit code {self.code}'}"


def read_restarts(stage: Path) -> list[Restart]:
    """The failures so far, oldest first; [] if there are none. Damaged lines are left out."""
    try:
        raw = read_bytes(stage / RESTARTS)
    except (OSError, ValueError):
        return []
    restarts = []
    for text in raw.splitlines():
        try:
            line = parse_json(text)
            numbers = [typed(line, name, int) for name in ("code", "reached")]
            words = [typed(line, name, str) for name in ("job", "action", "node", "first")]
            when = typed(line, "time", float)
        except ValueError:
            continue
        restarts.append(Restart(when, words[0], numbers[0], numbers[1], words[1], words[2], words[3]))
    return restarts


def count_restarts(restarts: Sequence[Restart]) -> str:
    """A summary such as "started again 9 times in place, once by the queue"; "" for none."""
    counts = Counter(restart.action for restart in restarts)
    times = [f"{'once' if n == 1 else f'{n} times'} {HOW[how]}" for how in HOW if (n := counts[how])]
    return f"started again {', '.join(times)}" if times else ""
