"""A run directory as one self-contained HTML page, and its evaluation as a table for the terminal.

    python -m pretrain.report --run-dir runs/quickstart        writes runs/quickstart/report.html

Works on runs that are going on, and on runs that have only some of their stages; the page names what is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pretrain.command import make_parser, run
from pretrain.files import write_file
from pretrain.report.page import page
from pretrain.report.rows import (
    DIRECTIONS,
    RANKS,
    apart_rows,
    chance,
    load_run,
    masked_rows,
    other_rows,
    retrieval_rows,
)
from pretrain.visible import visible


def format_table(run_dir: Path | str) -> str:
    """The evaluations of all stages of a run as lines for the terminal. Raises ValueError if there is no stage."""
    stages = load_run(Path(run_dir))
    lines: list[str] = []
    if rows := retrieval_rows(stages):
        candidates = {row.candidates for row in rows if row.candidates}
        width = max(len("Retrieval, percent"), *(len(row.label) for row in rows)) + 2
        lines.append(f"{'Retrieval, percent':<{width}}" + "".join(f"{title:>22}" for title in DIRECTIONS.values()))
        lines.append(" " * width + (" " + "".join(f"{f'R@{k}':>7}" for k in RANKS)) * len(DIRECTIONS))
        for row in rows:
            cells = "".join(
                " " + "".join(_cell(row.recall.get((direction, k)), 7) for k in RANKS) for direction in DIRECTIONS
            )
            lines.append(f"{row.label:<{width}}{cells}")
        for count in sorted(candidates):
            cells = (" " + "".join(_cell(chance(count, k), 7) for k in RANKS)) * len(DIRECTIONS)
            lines.append(f"{f'chance of {count}':<{width}}{cells}")
        lines.append("")
    if masked := masked_rows(stages):
        names = [f"{row.stage}: {row.label}" for row in masked]
        width = max(len("Masked accuracy, percent"), *map(len, names)) + 2
        lines.append(f"{'Masked accuracy, percent':<{width}}{'accuracy':>10}{'baseline':>10}")
        lines += [
            f"{name:<{width}}{_cell(row.accuracy, 10)}{_cell(row.baseline, 10)}"
            for name, row in zip(names, masked, strict=True)
        ]
        lines.append("")
    if others := other_rows(stages):
        width = max(len(f"{stage}: {key}") for stage, key, *_ in others) + 2
        with_baseline = any(baseline is not None for *_, baseline in others)
        lines += [f"{'More':<{width}}{'value':>10}{'baseline':>10}"] if with_baseline else []
        lines += [
            f"{f'{stage}: {key}':<{width}}{value:>10.4g}" + (f"{baseline:>10.4g}" if baseline is not None else "")
            for stage, key, value, baseline in others
        ]
        lines.append("")
    title = ""
    for stage, name, differs, key, value in apart_rows(stages):
        if title != (title := f"Apart: {stage}, eval-{name}.json (other: {differs})"):
            lines.append(title)
        lines.append(f"  {key:<40}{value:>10.4g}")
    # Names of stages and keys of eval.json may be anything: no escape code gets to the terminal.
    return "\n".join(map(visible, lines)).rstrip() or "No stage of this run has been evaluated yet."


def _cell(value: float | None, width: int) -> str:
    """A percentage, right-aligned; "-" for None."""
    return f"{'-' if value is None else f'{value:.1f}':>{width}}"


def write_report(run_dir: Path) -> Path:
    """Writes RUN_DIR/report.html -> its path. The old page stays until the new one is whole. ValueError if there is no
    stage, OSError if the page cannot be written."""
    stages = load_run(run_dir)
    path = run_dir / "report.html"
    html = page(run_dir, stages)
    try:
        write_file(path, html.encode())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; free space, or make it writable", str(path)) from None
    return path


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("pretrain.report", __doc__, "--run-dir runs/quickstart")
    parser.add_argument("--run-dir", required=True, type=Path, help="the --run-dir of pretrain.train")
    args = parser.parse_args(argv)
    return run(lambda: _run(args.run_dir), state="an earlier page is intact")


def _run(run_dir: Path) -> None:
    path = write_report(run_dir)
    print(format_table(run_dir))
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
