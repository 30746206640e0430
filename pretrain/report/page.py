"""The report as HTML: header, evaluation tables, and per stage its charts. Everything from outside is escaped."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from datetime import datetime
from html import escape
from pathlib import Path

import torch

from pretrain.metrics import FILE
from pretrain.report.charts import Chart, Curve, figure
from pretrain.report.rows import DIRECTIONS, RANKS, StageRun, chance, finite, masked_rows, other_rows, retrieval_rows
from pretrain.report.samples import samples_html
from pretrain.report.style import CSS, SCRIPT

PART_COLOURS = {"total": 0, "image": 1, "text": 2, "pair_image": 3, "pair_text": 4}


def page(run_dir: Path, stages: list[StageRun]) -> str:
    """The whole page as HTML."""
    recipes = {str(stage.recipe["name"]): None for stage in stages if stage.recipe.get("name")}
    title = ", ".join(recipes) or run_dir.resolve().name
    links = "".join(f'<a href="#{_anchor(i)}">{escape(stage.name)}</a>' for i, stage in enumerate(stages))
    sections = "".join(_stage(i, stage) for i, stage in enumerate(stages))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · Imglish</title><style>{CSS}</style></head><body>"
        f'<header><p class="over">Imglish pretraining report</p><h1>{escape(title)}</h1>'
        f'<p class="soft">{escape(_about(stages))}</p>'
        f'<nav aria-label="Stages">{links}</nav>{_tiles(stages)}</header>'
        f"<main>{_tables(stages)}{sections}</main>"
        f'<footer class="soft">Page written {datetime.now():%d %B %Y, %H:%M} on {escape(_machine())}. '
        "Training time counts steps only, not starting or saving. Hover a chart, or focus it and use the arrow keys, "
        f"for its numbers.</footer><script>{SCRIPT}</script></body></html>"
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


def _tiles(stages: list[StageRun]) -> str:
    """The few numbers that matter most."""
    tiles = []
    rows = retrieval_rows(stages)
    trained = [row for row in rows if row.stage != "scratch"]
    scratch = next((row for row in rows if row.stage == "scratch"), None)
    for direction, name in DIRECTIONS.items() if trained else ():
        best = trained[-1].recall.get((direction, 1))
        if best is None:
            continue
        below = [f"from scratch {s:.1f} %"] if scratch and (s := scratch.recall.get((direction, 1))) is not None else []
        below += [f"chance {chance(n, 1):.1f} %"] if (n := trained[-1].candidates) else []
        tiles.append(_tile(f"R@1, {name}", f"{best:.1f}", "%", " · ".join(below)))
    masked = masked_rows(stages)
    for row in [row for row in masked if row.stage == masked[-1].stage][-2:]:
        below = [f"baseline {row.baseline:.1f} %"] if row.baseline is not None else []
        tiles.append(_tile(f"Masked {row.label}", f"{row.accuracy:.1f}", "%", "".join(below)))
    if seconds := sum(stage.seconds for stage in stages):
        steps = sum(stage.step for stage in stages)
        value, unit = (f"{seconds / 3600:.1f}", "h") if seconds >= 5400 else (f"{seconds / 60:.1f}", "min")
        tiles.append(_tile("Training time", value, unit, f"{steps:,} steps in {len(stages)} stages"))
    return f'<dl class="tiles">{"".join(tiles)}</dl>' if tiles else ""


def _tile(name: str, value: str, unit: str, below: str) -> str:
    return (
        f'<div class="tile"><dt>{escape(name)}</dt><dd class="big">{value}<small> {unit}</small></dd>'
        f'<dd class="soft">{escape(below)}</dd></div>'
    )


def _tables(stages: list[StageRun]) -> str:
    columns = [_retrieval_table(stages) + _other_table(stages), _masked_table(stages)]
    shown = "".join(f'<div class="stack">{column}</div>' for column in columns if column)
    shown = shown or '<p class="note">No stage has been evaluated yet.</p>'
    return f'<h3>Evaluation on held-out data</h3><div class="tables">{shown}</div>'


def _retrieval_table(stages: list[StageRun]) -> str:
    rows = retrieval_rows(stages)
    if not rows:
        return ""
    cells = [(direction, k) for direction in DIRECTIONS for k in RANKS]
    body = ""
    for row in rows:
        name, _, rest = row.label.partition(": ")
        values = "".join(_percent(row.recall.get(cell), key=cell[1] == 1) for cell in cells)
        minor = ' class="minor"' if row.stage == "scratch" else ""
        body += f"<tr{minor}><th scope=row>{escape(name)}<small>{escape(rest)}</small></th>{values}</tr>"
    for count in sorted({row.candidates for row in rows if row.candidates}):
        values = "".join(_percent(chance(count, k)) for _, k in cells)
        body += f'<tr class="minor"><th scope=row>chance<small>{count:,} candidates</small></th>{values}</tr>'
    groups = "".join(f"<th colspan={len(RANKS)} scope=colgroup>{name}</th>" for name in DIRECTIONS.values())
    ranks = "".join(f"<th scope=col>R@{k}</th>" for _, k in cells)
    head = f"<tr><td></td>{groups}</tr><tr><th scope=col>stage</th>{ranks}</tr>"
    return _table("Retrieval", "percent of queries with the right answer among the first k", head, body)


def _masked_table(stages: list[StageRun]) -> str:
    rows = masked_rows(stages)
    if not rows:
        return ""
    body = ""
    for row in rows:
        tick = f'<b style="left:{_clamp(row.baseline):.1f}%"></b>' if row.baseline is not None else ""
        body += (
            f"<tr><th scope=row>{escape(row.stage)}<small>{escape(row.label)}</small></th>"
            f"{_percent(row.accuracy, key=True)}{_percent(row.baseline)}"
            f'<td class="bar"><span class="track"><i style="width:{_clamp(row.accuracy):.1f}%"></i>{tick}</span></td>'
            "</tr>"
        )
    head = "<tr><th scope=col>stage</th><th scope=col>accuracy</th><th scope=col>baseline</th><td></td></tr>"
    return _table("Masked prediction", "percent; baseline: always the most frequent answer", head, body)


def _other_table(stages: list[StageRun]) -> str:
    rows = other_rows(stages)
    body = "".join(
        f"<tr><th scope=row>{escape(stage)}<small>{escape(key)}</small></th><td>{value:.4g}</td></tr>"
        for stage, key, value in rows
    )
    return _table("More", "", "<tr><th scope=col>stage</th><th scope=col>value</th></tr>", body) if rows else ""


def _table(title: str, unit: str, head: str, body: str) -> str:
    return (
        f'<div class="card"><table><caption>{title} <span>{unit}</span></caption>'
        f"<thead>{head}</thead><tbody>{body}</tbody></table></div>"
    )


def _percent(value: float | None, *, key: bool = False) -> str:
    return f"<td{' class=key' if key else ''}>{'-' if value is None else f'{value:.1f}'}</td>"


def _clamp(percent: float) -> float:
    return min(max(percent, 0.0), 100.0)


def _anchor(index: int) -> str:
    return f"stage-{index}"


def _stage(index: int, stage: StageRun) -> str:
    settings = stage.recipe.get("stages", {})
    settings = settings.get(stage.name, {}) if isinstance(settings, dict) else {}
    facts = [f"{stage.step:,} steps"] if stage.lines else []
    if stage.lines and isinstance(seen := stage.lines[-1].get("samples_seen"), int | float):
        facts.append(f"{seen:,.0f} samples")
    facts += [f"{stage.seconds / 60:.1f} min in steps"] if stage.seconds else []
    if isinstance(settings, dict) and isinstance(start := settings.get("init_from"), str):
        facts.append(f"starts from {start}")
    state, css = ("finished", "badge") if stage.finished else ("not finished", "badge open")
    if not stage.finished and stage.steps and stage.lines:
        state = f"step {stage.step:,} of {stage.steps:,}"
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in stage.notes)
    pictures, problems = samples_html(stage.directory, stage.samples)
    notes += "".join(f'<p class="note">{escape(problem)}</p>' for problem in problems)
    return (
        f'<section class="stage" id="{_anchor(index)}"><div class="head"><h2>{escape(stage.name)}</h2>'
        f'<span class="{css}">{state}</span><span class="soft">{escape(" · ".join(facts))}</span></div>'
        f'<div class="charts">{_charts(stage)}</div>{pictures}{notes}</section>'
    )


def _charts(stage: StageRun) -> str:
    lines = stage.lines
    losses = _curves(lines, "loss/")
    total = [Curve("total", _points(lines, "loss"), 0, noise=True)]
    major = [
        Chart("Loss", total + (losses if len(losses) > 1 else []), smooth=True),
        Chart("Accuracy on training batches", _curves(lines, "accuracy/", 100), unit="%", from_zero=True, smooth=True),
        Chart("Codebook", _curves(lines, "codebook"), from_zero=True),
    ]
    minor = [
        Chart("Learning rate", [Curve("highest", _points(lines, "lr"))], from_zero=True, peak=True),
        Chart("Gradient norm", [Curve("norm", _points(lines, "grad_norm"), noise=True)], from_zero=True, smooth=True),
        Chart(
            "Throughput", [Curve("samples/s", _points(lines, "samples_per_s"), noise=True)], from_zero=True, smooth=True
        ),
        Chart(
            "Waiting for data", [Curve("of the step", _points(lines, "data_wait", 100), noise=True)], "%", True, True
        ),
        Chart("Model FLOPs utilisation", [Curve("MFU", _points(lines, "mfu", 100))], unit="%", from_zero=True),
    ]
    wide, small = ([html for chart in charts if (html := figure(chart))] for charts in (major, minor))
    sizes = [" wide"] * len(wide)
    if len(wide) % 2:
        sizes[-1] = " full"
    sizes += [" third" if len(small) in (3, 5, 6) else ""] * len(small)
    shown = zip([*wide, *small], sizes, strict=True)
    return "".join(html.replace('class="chart"', f'class="chart{size}"', 1) for html, size in shown)


def _points(lines: list[dict], key: str, scale: float = 1) -> list[tuple[float, float | None]]:
    """The points of a key over the lines that have it; null is a gap."""
    found = [(line["step"], finite(line[key])) for line in lines if key in line]
    return [(step, None if value is None else value * scale) for step, value in found]


def _curves(lines: list[dict], prefix: str, scale: float = 1) -> list[Curve]:
    """One curve for each key that starts with `prefix`, in the order of their first appearance."""
    keys: Iterable[str] = {key: None for line in lines for key in line if key.startswith(prefix)}
    curves = []
    for i, key in enumerate(keys):
        name = key.removeprefix(prefix).strip("_/") or key
        colour = PART_COLOURS.get(name, (i + 1) % 6)
        curves.append(Curve(name.replace("_", " "), _points(lines, key, scale), colour))
    return curves
