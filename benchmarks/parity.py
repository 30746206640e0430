"""The parity matrix of tests/parity as a table: how far every legal layout of ranks is from one dense process.

    python -m benchmarks.parity --out benchmarks/results/parity.json --readme ds_configs/README.md

Trains on every legal layout of 1 to 8 gloo ranks and in one dense process, in some minutes, from the repository's root.
Ends with 1 if a cell is beyond the tolerance.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import machine
from pretrain.command import about, make_parser, run, write
from tests.parity.cells import PRECISIONS
from tests.parity.published import PublishedCell
from tests.parity.runs import ROWS, TOLERANCES, AnyCell, Apart, apart, compare, dense, failures

BEGIN, END = "<!-- made by benchmarks/parity.py: begin -->", "<!-- made by benchmarks/parity.py: end -->"


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.parity", __doc__, '--only "ZeRO-1 x TP2"')
    parser.add_argument("--only", default="", metavar="TEXT", help="only layouts whose name holds this")
    parser.add_argument("--out", type=Path, help="also write a JSON with every cell here")
    parser.add_argument("--readme", type=Path, help="put the table between the marks in this file")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="nothing was written")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> int:
    chosen = {row: cells for row, cells in ROWS.items() if args.only in row}
    if not chosen:
        raise ValueError(f"--only {args.only!r} is in no layout's name; they are like {next(iter(ROWS))!r}")
    if args.only and args.readme:
        raise ValueError("--readme wants the whole matrix; leave out --only")
    if args.readme:
        _split(args.readme)  # before the minutes
    distances: dict[AnyCell, Apart] = {}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="parity") as folder:
        for cells in tqdm(chosen.values(), unit="layout", disable=None):
            distances |= compare(cells, Path(folder))
    alone = {cell: apart(cell, [dense(cell, "bf16")[0]]) for cell in distances if cell.precision == "bf16"}
    facts: dict[str, Any] = about("benchmarks.parity", arguments) | machine("torch", "deepspeed", "megatron-core")
    facts |= {"cells": len(distances), "seconds": round(time.perf_counter() - start)}
    rows = _table(chosen, distances, alone)
    print("\n".join(rows))
    results = facts | {
        "tolerances": {name: each._asdict() for name, each in TOLERANCES.items()},
        "layouts": {row: _by_precision({cell: distances[cell] for cell in cells}) for row, cells in chosen.items()},
        "dense_bf16": {row: _worst(some) for row, some in _by_passes(alone).items()},
        "every_cell": {
            str(cell): " ".join(f"{n} {v:.1e}" for n, v in each._asdict().items()) for cell, each in distances.items()
        },
    }
    write(results, args.out, show=False)
    if args.readme:
        _put(args.readme, rows, facts)
    beyond = failures(distances)
    for line in beyond:
        print(f"beyond the tolerance: {line}", file=sys.stderr)
    return 1 if beyond else 0


def _worst(some: Sequence[Apart]) -> dict[str, float]:
    return {name: float(f"{max(getattr(each, name) for each in some):.2e}") for name in Apart._fields}


def _by_passes(alone: dict[AnyCell, Apart]) -> dict[str, list[Apart]]:
    """The distances of dense processes, by the name of their row."""
    rows: dict[str, list[Apart]] = {}
    for cell, each in alone.items():
        passes = f", {cell.passes} passes" if cell.passes > 1 else ""
        rows.setdefault(f"one dense process{passes}", []).append(each)
    return rows


def _by_precision(distances: dict[AnyCell, Apart]) -> dict[str, Any]:
    parts = {p: [each for cell, each in distances.items() if cell.precision == p] for p in PRECISIONS}
    return {p: _worst(some) for p, some in parts.items() if some}


def _table(chosen: dict[str, list[AnyCell]], distances: dict[AnyCell, Apart], alone: dict[AnyCell, Apart]) -> list[str]:
    head = ["layout", "ranks", "cells"]
    head += [f"{precision} {what}" for precision in PRECISIONS for what in ("loss", "norm", "weights", "way")]
    rows = [head, ["---"] * len(head)]
    for row, cells in chosen.items():
        worst = _by_precision({cell: distances[cell] for cell in cells})
        missing = "not run" if isinstance(cells[0], PublishedCell) else "illegal"
        figures = [figure for precision in PRECISIONS for figure in _figures(worst.get(precision), missing)]
        rows.append([row, str(cells[0].topology.world), str(len(cells)), *figures])
    for row, some in _by_passes(alone).items():
        rows.append([row, "1", str(len(some)), *[""] * 4, *_figures(_worst(some))])
    return [f"| {' | '.join(row)} |" for row in rows]


def _figures(worst: dict[str, float] | None, missing: str = "illegal") -> list[str]:
    if worst is None:
        return [missing, "", "", ""]
    norm = f"{worst['norm']:.1e} ({worst['norm_once']:.1e})"
    return [f"{worst['loss']:.1e}", norm, f"{worst['weights']:.1e}", f"{worst['way']:.0e}"]


def _split(readme: Path) -> tuple[str, str]:
    """What stands before and behind the marks."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"--readme {readme} must hold the lines {BEGIN!r} and {END!r} once each; add them")
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]


def _put(readme: Path, rows: list[str], facts: dict[str, Any]) -> None:
    before, behind = _split(readme)
    where = (
        f"{facts['cells']} cells: `{facts['command']}`, {facts['seconds']} s on {facts['cpu_cores']} CPU cores, "
        f"torch {facts['torch']}, deepspeed {facts['deepspeed']}, megatron-core {facts['megatron-core']}, "
        f"{facts['date']}."
    )
    parts = [BEGIN, *rows, "", where, END]
    readme.write_text(before + "\n".join(parts) + behind, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
