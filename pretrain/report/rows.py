"""Reads a run directory for the report: its stages in order, and the rows of the evaluation tables."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pretrain.checkpoint.weights import WEIGHTS
from pretrain.json_files import read_object
from pretrain.lives import Life, read_lives
from pretrain.metrics import EVALS, FILE, read_metrics
from pretrain.restarts import Restart, read_restarts
from pretrain.rollbacks import Rollback, passed_batches, read_rollbacks

# The order of stages that no recipe.json names.
USUAL_ORDER = ("tokenizer", "vision", "language", "fusion", "retrieval", "captions", "scratch")
PARTS = {
    "image": "image patches",
    "text": "words",
    "pair_image": "image patches in pairs",
    "pair_text": "words in pairs",
}
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}
RANKS = (1, 5, 10)
MOST_BYTES = 2**28  # of one of a stage's JSON files; samples.json is the largest, since it holds pictures
SETTINGS, LONGEST = 3, 60  # how many different settings are shown; how many characters of a value


@dataclass
class StageRun:
    """The content of RUN_DIR/STAGE; whatever cannot be read is empty and has a note."""

    name: str
    directory: Path
    recipe: dict = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    during: list[dict[str, Any]] = field(default_factory=list)  # evaluations while it trained, by step
    evaluation: dict[str, Any] = field(default_factory=dict)
    apart: dict[str, dict[str, Any]] = field(default_factory=dict)  # by name: evaluations that are not the stage's own
    samples: dict[str, list] = field(default_factory=dict)
    lives: list[Life] = field(default_factory=list)
    restarts: list[Restart] = field(default_factory=list)
    rollbacks: tuple[Rollback, ...] = ()
    notes: list[str] = field(default_factory=list)  # what is missing or could not be read

    @property
    def steps(self) -> int | None:
        """How many steps the recipe asks for; None where that is not known."""
        steps = dig(self.recipe, "stages", self.name, "steps")
        return steps if isinstance(steps, int) else None

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl; 0 where there is none."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def went_back(self) -> str:
        """How often the stage went back to a checkpoint, and how many batches it skipped; "" where it never did."""
        if not self.rollbacks:
            return ""
        batches = sum(last - first + 1 for first, last in passed_batches(self.rollbacks))
        times = "once" if len(self.rollbacks) == 1 else f"{len(self.rollbacks)} times"
        return f"went back {times}, past {batches:,} batches"

    @property
    def finished(self) -> bool:
        return (self.directory / WEIGHTS).is_file()

    @property
    def seconds(self) -> float:
        """Seconds spent in steps, without saving and starting."""
        total, seen = 0.0, 0.0
        for line in self.lines:
            now, speed = finite(line.get("samples_seen")), finite(line.get("samples_per_s"))
            if now is not None and speed is not None and speed > 0:
                total += max(now - seen, 0) / speed
                seen = now
        return total

    def effective(self, now: float | None = None) -> float | None:
        """The share, 0 to 1, of the time since the first start that went into steps that count; None where that is not
        known. `now`: seconds since 1970, for a run that goes on."""
        if not self.lives:
            return None
        ended = [life.ended for life in self.lives if life.ended is not None]
        wall = max([*ended, self.lives[-1].begun, *([now] if now else [])]) - self.lives[0].begun
        return min(self.seconds / wall, 1.0) if wall > 0 and self.seconds else None


@dataclass(frozen=True)
class RetrievalRow:
    """Recall in percent of one stage: (direction, k) -> value."""

    stage: str
    label: str
    recall: dict[tuple[str, int], float]
    candidates: int | None


@dataclass(frozen=True)
class MaskedRow:
    """Masked accuracy in percent of one stage and part, and what a constant guess would reach."""

    stage: str
    label: str
    accuracy: float
    baseline: float | None


def load_run(run_dir: Path) -> list[StageRun]:
    """The stages under `run_dir`, in the order of the recipe. Raises ValueError if there are none."""
    if not run_dir.is_dir():
        raise ValueError(f"--run-dir {run_dir} is not a directory; give the directory that the stages were trained in")
    loaded = [
        _load_stage(path)
        for path in sorted(run_dir.iterdir())
        if path.is_dir() and any((path / name).is_file() for name in ("recipe.json", FILE, "eval.json"))
    ]
    if not loaded:
        raise ValueError(
            f"--run-dir {run_dir} holds no stage (a directory with recipe.json, {FILE} or eval.json); give the "
            "directory that was --run-dir of pretrain.train"
        )
    orders = [list(stages) for stage in loaded if isinstance(stages := stage.recipe.get("stages"), dict)]
    order = [*max(orders, key=len, default=[]), *USUAL_ORDER]
    # The stage without pretraining, for comparison, comes last, wherever the recipe has it.
    return sorted(loaded, key=lambda s: (s.name == "scratch", order.index(s.name) if s.name in order else len(order)))


def _load_stage(directory: Path) -> StageRun:
    stage = StageRun(directory.name, directory)
    stage.recipe = _read_object(directory / "recipe.json", stage.notes)
    stage.evaluation = _read_object(directory / "eval.json", stage.notes)
    stage.lives, stage.restarts = read_lives(directory), read_restarts(directory)
    try:
        stage.rollbacks = read_rollbacks(directory)
    except (OSError, ValueError) as error:
        stage.notes.append(str(error))
    for path in sorted(directory.glob("eval-*.json")):
        stage.apart[path.stem.removeprefix("eval-")] = _read_object(path, stage.notes)
    samples = _read_object(directory / "samples.json", stage.notes)
    stage.samples = {
        kind: [entry for entry in entries if isinstance(entry, dict)]
        for kind, entries in samples.items()
        if isinstance(entries, list)
    }
    stage.lines = _read_lines(directory / FILE, stage.notes)
    stage.during = _read_lines(directory / EVALS, stage.notes)
    missing = [
        name
        for name, there in (
            (f"curves ({FILE})", stage.lines),
            ("evaluation (eval.json)", stage.evaluation),
            ("sample pictures (samples.json)", any(stage.samples.values())),
        )
        if not there
    ]
    if missing:
        stage.notes.append(f"Not there yet: {', '.join(missing)}.")
    return stage


def _read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file; [] with a note if they cannot be read, [] alone if there is no file."""
    try:
        return read_metrics(path)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        notes.append(str(error))
        return []


def _read_object(path: Path, notes: list[str]) -> dict:
    """The JSON object in `path`; {} with a note if there is something else, {} alone if there is no file."""
    try:
        return read_object(path, MOST_BYTES)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} could not be read: {error}.")
        return {}


def dig(value: Any, *keys: str) -> Any:
    """value[keys[0]][keys[1]]...; None where a key is missing or what should have it is no dictionary."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def retrieval_rows(stages: list[StageRun]) -> list[RetrievalRow]:
    """A row for each stage and set of its evaluation, in the order of the stages."""
    rows = []
    for stage in stages:
        sets: dict[str, dict[tuple[str, int], float]] = {}
        for key, value in numbers(stage.evaluation).items():
            if match := re.fullmatch(r"(.+)/(image_to_text|text_to_image)/R@(\d+)", key):
                sets.setdefault(match[1], {})[match[2], int(match[3])] = value
        for name, recall in sets.items():
            candidates = numbers(stage.evaluation).get(f"{name}/candidates")
            label = stage.name if name == "retrieval" else f"{stage.name}, {name.removeprefix('retrieval/')}"
            label += ": same budget, no pretraining" if stage.name == "scratch" else ""
            rows.append(RetrievalRow(stage.name, label, recall, int(candidates) if candidates else None))
    if len({row.candidates for row in rows}) > 1:  # they cannot be compared unless each row says it
        rows = [replace(row, label=f"{row.label} ({row.candidates or 'unknown'} candidates)") for row in rows]
    return rows


def masked_rows(stages: list[StageRun]) -> list[MaskedRow]:
    """A row for each stage and part (see PARTS) of its masked prediction, in the order of the stages."""
    rows = []
    for stage in stages:
        values = numbers(stage.evaluation)
        for key, value in values.items():
            if key.startswith("masked/") and key.endswith("/accuracy"):
                part = key.removeprefix("masked/").removesuffix("/accuracy")
                baseline = values.get(f"masked/{part}/baseline")
                rows.append(MaskedRow(stage.name, PARTS.get(part, part), value, baseline))
    return rows


def other_rows(stages: list[StageRun]) -> list[tuple[str, str, float, float | None]]:
    """(stage, key, value, baseline if there is one) of every evaluation number that no other table shows."""
    # Beside the figure that a baseline is of (CIDEr, accuracy) stand others that it says nothing of.
    without = re.compile(r"BLEU-\d|ROUGE-L|METEOR|SPICE|choice")
    known = re.compile(r"step|.*/(accuracy|baseline)|.*/(image_to_text|text_to_image)/R@\d+|.*/candidates")
    return [
        (stage.name, key, value, None if without.fullmatch(last) else values.get(f"{before}/baseline"))
        for stage in stages
        for values in (numbers(stage.evaluation),)
        for key, value in values.items()
        for before, _, last in (key.rpartition("/"),)
        if not known.fullmatch(key) or (key.endswith("/accuracy") and not key.startswith("masked/"))
    ]


def apart_rows(stages: list[StageRun]) -> list[tuple[str, str, str, str, float]]:
    """(stage, name, what differs from the stage's own evaluation, key, value) of each number in its eval-NAME.json."""
    return [
        (stage.name, name, _differs(values), key, value)
        for stage in stages
        for name, values in stage.apart.items()
        for key, value in numbers(values).items()
        if key != "step"
    ]


def _differs(values: dict[str, Any]) -> str:
    """The first settings that differ from the stage's own evaluation, with the values they have here."""
    differs = values.get("differs")
    if not isinstance(differs, dict):
        return "weights"
    shown = [f"{key}={_short(pair[1])}" for key, pair in differs.items() if isinstance(pair, list) and len(pair) == 2]
    more = [f"{len(shown) - SETTINGS} more"] if len(shown) > SETTINGS else []
    return ", ".join([*shown[:SETTINGS], *more])


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def numbers(values: dict[str, Any]) -> dict[str, float]:
    """The entries that are finite numbers."""
    return {k: v for k, v in values.items() if finite(v) is not None}


def finite(value: Any) -> float | None:
    """The value if it is a finite number: Python's json reads NaN and Infinity too."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None


def chance(candidates: int, k: int) -> float:
    """Percent of queries whose one right answer a random order puts among the first k."""
    return 100 * min(k / candidates, 1.0)
