"""Shows what shards contain and how it got there, in one HTML page that needs no network.

    python -m data_tools.audit data/cc12m data/laion --out audit.html

Counts, sizes, aspect ratios, caption lengths, words, languages, failed downloads by reason and server, copies, the
steps that led here with their reasons (DIR/steps), random samples, and examples of dropped samples
(DIR/drops). Changes nothing in DIR. Several directories make one page, for slices of a list or parts of a set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_tools.audit_page.facts import gather
from data_tools.audit_page.page import page
from data_tools.lists.languages import detector
from pretrain.command import add_directories, add_workers, make_parser, run
from pretrain.files import write_file


def audit(directories: list[Path], out: Path, *, seed: int = 0, samples: int = 60, workers: int = 1) -> int:
    """Writes the page. -> its size in bytes. Raises ValueError for a directory without shards, a broken shard, or a
    damaged step record."""
    if samples < 0:
        raise ValueError(f"--samples={samples} is below 0; use 60, or 0 for none")
    try:
        detect = detector()
    except ValueError:  # not installed, and the page says so
        detect = None
    facts = gather(directories, seed=seed, wall=samples, workers=workers, detect=detect)
    html = page(directories, facts, seed).encode()
    out.parent.mkdir(parents=True, exist_ok=True)
    write_file(out, html)
    return len(html)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("data_tools.audit", __doc__, "data/cc12m --out audit.html --workers 8")
    add_directories(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page")
    parser.add_argument("--samples", type=int, default=60, metavar="N", help="random samples to show (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random samples (%(default)s)")
    add_workers(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), state="no page was written")


def _run(args: argparse.Namespace) -> None:
    size = audit(args.directories, args.out, seed=args.seed, samples=args.samples, workers=args.workers)
    print(f"{args.out}: {size / 2**20:.1f} MiB, open it in any browser")


if __name__ == "__main__":
    sys.exit(main())
