"""Shows how far a running stage is, and its numbers."""

from __future__ import annotations

import logging
import os
import sys
import time

from tqdm import tqdm

from pretrain.distributed import rank
from pretrain.visible import visible

log = logging.getLogger("pretrain")
PLAIN_SECONDS = 5.0
COLUMNS, ROWS = 80, 24


class Display:
    """A progress bar on a terminal, and elsewhere a plain line every few seconds."""

    def __init__(self, name: str, start: int, steps: int):
        self.steps, self.last_shown = steps, 0.0
        quiet = rank() != 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, desc=visible(name), unit="step", disable=quiet, **_size())

    def show(self, step: int, line: dict) -> None:
        prefix = "accuracy/"
        accuracies = " ".join(f"{k.removeprefix(prefix)} {v:.1%}" for k, v in line.items() if k.startswith(prefix))
        text = f"loss {line['loss']:.4f} {accuracies} {line['samples_per_s']:.0f}/s wait {line['data_wait']:.0%}"
        self.bar.set_postfix_str(visible(text))
        if self.bar.disable and (step == self.steps or time.monotonic() - self.last_shown > PLAIN_SECONDS):
            log.info("step %d/%d %s", step, self.steps, text)
            self.last_shown = time.monotonic()


def _size() -> dict[str, int]:
    """tqdm's size for a terminal that claims to have no columns or rows, as some under docker and srun do, where tqdm
    would show nothing. Empty for any other: tqdm asks the terminal itself."""
    try:
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        return {}
    return {} if columns and rows else {"ncols": columns or COLUMNS, "nrows": rows or ROWS}
