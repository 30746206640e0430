"""The report of a run for templates/report.html: header, evaluation tables, and per stage its charts and samples."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from pretrain.metrics import FILE
from pretrain.report.charts import Chart, Curve, Drawing, drawing
from pretrain.report.checkpoints import checkpoints
from pretrain.report.html import TEMPLATES, render
from pretrain.report.rows import (
    DIRECTIONS,
    RANKS,
    StageRun,
    apart_rows,
    chance,
    dig,
    finite,
    masked_rows,
    other_rows,
    retrieval_rows,
)
from pretrain.report.samples import folds
from pretrain.restarts import count_restarts

SHOWN_RESTARTS = 5  # the last ones
PART_COLOURS = {"total": 0, "image": 1, "text": 2, "pair_image": 3, "pair_text": 4}


def page(run_dir: Path, stages: list[StageRun]) -> str:
    """The whole page as HTML."""
    recipes = {str(stage.recipe["name"]): None for stage in stages if stage.recipe.get("name")}
    return render(
        TEMPLATES / "report.html",
        scripts=[TEMPLATES / "charts.js"],
        kind="Imglish pretraining report",
        title=", ".join(recipes) or run_dir.resolve().name,
        series="Imglish",
        about=_about(stages),
        contents="Stages",
        links=[(f"stage-{i}", stage.name) for i, stage in enumerate(stages)],
        tiles=_tiles(stages),
        directions=list(DIRECTIONS.values()),
        ranks=RANKS,
        retrieval=_retrieval(stages),
        masked=masked_rows(stages),
        others=other_rows(stages),
        apart=apart_rows(stages),
        stages=[_stage(stage) for stage in stages],
        machine=_machine(),
    )


def _about(stages: list[StageRun]) -> str:
    """The model in a line, and when it was trained."""
    parts = []
    model: dict = next((s.recipe["model"] for s in stages if isinstance(s.recipe.get("model"), dict)), {})
    for text, keys in (
        ("{} blocks of width {}", ("depth", "dim")),
        ("{} px pictures in patches of {}", ("image_size", "patch_size")),
        ("vocabulary of {}", ("vocab_size",)),
    ):
        if all(isinstance(model.get(key), int) for key in keys):
            parts.append(text.format(*(f"{model[key]:,}" for key in keys)))
    files = [stage.directory / name for stage in stages for name in ("eval.json", FILE)]
    if times := [path.stat().st_mtime for path in files if path.is_file()]:
        parts.append(f"last result {datetime.fromtimestamp(max(times)):%d %B %Y, %H:%M}")
    return " · ".join(parts)


def _machine() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, no GPU"


def _tiles(stages: list[StageRun]) -> list[tuple[str, str, str, str]]:
    """The few numbers that matter most: (name, value, unit, the line below)."""
    tiles = []
    rows = retrieval_rows(stages)
    others = [row for row in rows if row.stage != "scratch"]
    # Of the last stage its first set: behind that stand its folds, in which a query has fewer candidates.
    trained = next((row for row in others if row.stage == others[-1].stage), None)
    scratch = next((row for row in rows if row.stage == "scratch"), None)
    for direction, name in DIRECTIONS.items():
        best = trained.recall.get((direction, 1)) if trained else None
        if trained is None or best is None:
            continue
        below = [f"from scratch {s:.1f} %"] if scratch and (s := scratch.recall.get((direction, 1))) is not None else []
        below += [f"chance {chance(n, 1):.1f} %"] if (n := trained.candidates) else []
        tiles.append((f"R@1, {name}", f"{best:.1f}", "%", " · ".join(below)))
    masked = masked_rows(stages)
    for row in [row for row in masked if row.stage == masked[-1].stage][-2:]:
        baseline = f"baseline {row.baseline:.1f} %" if row.baseline is not None else ""
        tiles.append((f"Masked {row.label}", f"{row.accuracy:.1f}", "%", baseline))
    if seconds := sum(stage.seconds for stage in stages):
        steps = sum(stage.step for stage in stages)
        value, unit = (f"{seconds / 3600:.1f}", "h") if seconds >= 5400 else (f"{seconds / 60:.1f}", "min")
        tiles.append(("Training time", value, unit, f"{steps:,} steps in {len(stages)} stages"))
    return tiles


def _retrieval(stages: list[StageRun]) -> list[tuple[str, str, list[float | None], bool]]:
    """The rows of the table: (name, the line below it, recalls in percent, whether it is only there for comparison)."""
    rows = retrieval_rows(stages)
    cells = [(direction, k) for direction in DIRECTIONS for k in RANKS]
    table = []
    for row in rows:
        name, _, below = row.label.partition(": ")
        table.append((name, below, [row.recall.get(cell) for cell in cells], row.stage == "scratch"))
    for count in sorted({row.candidates for row in rows if row.candidates}):
        table.append(("chance", f"{count:,} candidates", [chance(count, k) for _, k in cells], True))
    return table


def _stage(stage: StageRun) -> dict[str, Any]:
    """What templates/report.html shows of one stage."""
    settings = stage.recipe.get("stages", {})
    settings = settings.get(stage.name, {}) if isinstance(settings, dict) else {}
    facts = [f"{stage.step:,} steps"] if stage.lines else []
    if stage.lines and isinstance(seen := stage.lines[-1].get("samples_seen"), int | float):
        facts.append(f"{seen:,.0f} samples")
    facts += [f"{stage.seconds / 60:.1f} min in steps"] if stage.seconds else []
    facts += [f"{len(stage.lives)} lives"] if len(stage.lives) > 1 else []
    facts += [count] if (count := count_restarts(stage.restarts)) else []
    facts += [f"effective training time {share:.1%}"] if (share := stage.effective()) is not None else []
    facts += [f"checkpoints of step {'; '.join(map(str, entries))}"] if (entries := checkpoints(stage)) else []
    facts += [stage.went_back] if stage.rollbacks else []
    if isinstance(settings, dict) and isinstance(start := settings.get("init_from"), str):
        facts.append(f"starts from {start}")
    if isinstance(parent := dig(stage.recipe, "identity", "continues"), dict):
        facts.append(f"goes on from step {parent.get('step')} of {parent.get('from')}")
    state = "finished" if stage.finished else "not finished"
    if not stage.finished and stage.steps and stage.lines:
        state = f"step {stage.step:,} of {stage.steps:,}"
    groups, problems = folds(stage.directory, stage.samples)
    return {
        "name": stage.name,
        "state": state,
        "badge": "" if stage.finished else "open",
        "facts": " · ".join(facts),
        "charts": _charts(stage.lines, stage.during),
        "folds": groups,
        "restarts": [str(restart) for restart in stage.restarts[-SHOWN_RESTARTS:]],
        "notes": [*stage.notes, *problems],
    }


def _charts(lines: list[dict], during: list[dict]) -> list[tuple[Drawing, str]]:
    """The charts that have numbers, each with the style sheet's class for its width. `lines`: those of metrics.jsonl;
    `during`: those of evals.jsonl."""
    losses = _curves(lines, "loss/")
    total = [Curve("total", _points(lines, "loss"), 0, noise=True)]
    major = [
        Chart("Loss", total + (losses if len(losses) > 1 else []), smooth=True),
        Chart("Accuracy on training batches", _curves(lines, "accuracy/", 100), unit="%", from_zero=True, smooth=True),
        Chart("Share of the gradient", _curves(lines, "share/", 100), unit="%", from_zero=True, smooth=True),
        Chart("Codebook", _curves(lines, "codebook"), from_zero=True),
        *_held_out(during),
    ]
    norm = [Curve("norm", _points(lines, "grad_norm"), noise=True)]
    speed = [Curve("samples/s", _points(lines, "samples_per_s"), noise=True)]
    wait = [Curve("of the step", _points(lines, "data_wait", 100), noise=True)]
    spread = [Curve("its pass", _points(lines, "pass_spread", 100))]
    spread += [Curve("its wait for data", _points(lines, "wait_spread", 100), 1)]
    utilisation = [Curve("all (MFU)", _points(lines, "mfu", 100))]
    utilisation += [Curve("without padding", _points(lines, "mfu_real", 100))]
    utilisation += [Curve("computed", _points(lines, "mfu_executed", 100))]
    minor = [
        Chart("Learning rate", [Curve("highest", _points(lines, "lr"))], from_zero=True, peak=True),
        Chart("Gradient norm", norm, from_zero=True, smooth=True),
        Chart("Throughput", speed, from_zero=True, smooth=True),
        Chart("Waiting for data", wait, unit="%", from_zero=True, smooth=True),
        Chart("Model FLOPs utilisation", utilisation, unit="%", from_zero=True),
        Chart("Slowest rank, above the median", spread, unit="%", from_zero=True),
    ]
    wide, small = ([shown for chart in charts if (shown := drawing(chart))] for charts in (major, minor))
    sizes = ["wide"] * len(wide)
    if len(wide) % 2:
        sizes[-1] = "full"
    sizes += ["third" if len(small) in (3, 5, 6) else ""] * len(small)
    return list(zip([*wide, *small], sizes, strict=True))


def _held_out(during: list[dict]) -> list[Chart]:
    """A chart for each kind of figure of the evaluations: the last part of its name, such as accuracy and R@1."""
    keys = {key: None for line in during for key in line if "/" in key}
    kinds = {key.rpartition("/")[2]: None for key in keys}
    charts = []
    for kind in kinds:
        if kind in ("baseline", "candidates", "captions"):  # the same at each step
            continue
        names = [key for key in keys if key.rpartition("/")[2] == kind]
        curves = [
            Curve(name.rpartition("/")[0].replace("_", " "), _points(during, name), i % 6)
            for i, name in enumerate(names)
        ]
        charts.append(Chart(f"Held out: {kind.replace('_', ' ')}", curves, from_zero=True))
    return charts


def _points(lines: list[dict], key: str, scale: float = 1) -> list[tuple[float, float | None]]:
    """The points of a key, its values times `scale`, over the lines that have it; null is a gap."""
    points = [(line["step"], finite(line[key])) for line in lines if key in line]
    return [(step, None if value is None else value * scale) for step, value in points]


def _curves(lines: list[dict], prefix: str, scale: float = 1) -> list[Curve]:
    """One curve for each key that starts with `prefix`, in the order of their first appearance."""
    keys: Iterable[str] = {key: None for line in lines for key in line if key.startswith(prefix)}
    curves = []
    for i, key in enumerate(keys):
        name = key.removeprefix(prefix).strip("_/") or key
        colour = PART_COLOURS.get(name, (i + 1) % 6)
        curves.append(Curve(name.replace("_", " "), _points(lines, key, scale), colour))
    return curves
