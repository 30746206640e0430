"""restarts.jsonl in a stage's directory: a line for each time that its ranks failed, and what the job did then.

Read by the report and the status page too; without torch, which takes longer to import than all that a job script
decides with it.
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
    """`reached`: the last step that any life so far had done; `action`: again (in place), requeue or end; `node`: which
    one the first error names, or ""."""

    time: float  # seconds since 1970
    job: str
    code: int
    reached: int
    action: str
    node: str
    first: str  # the error that came first

    def __str__(self) -> str:
        how = f"started again {HOW[self.action]}" if self.action in HOW else "the job ended"
        return f"{how} at step {self.reached:,}: {self.first or f'exit code {self.code}'}"


def read_restarts(stage: Path) -> list[Restart]:
    """Oldest first; [] where there are none. Lines that are damaged are left out."""
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
    """Such as "started again 9 times in place, once by the queue"; "" for none."""
    counts = Counter(restart.action for restart in restarts)
    times = [f"{'once' if n == 1 else f'{n} times'} {HOW[how]}" for how in HOW if (n := counts[how])]
    return f"started again {', '.join(times)}" if times else ""
