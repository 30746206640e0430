"""Shows what is in shards, and how it came there: one HTML page that needs no network.

    python -m data_tools.audit data/cc12m data/laion --out audit.html

Counts, sizes, aspect ratios, caption lengths, words, languages, failed downloads by reason and server, copies, the
steps that led here with their reasons (DIR/steps), samples drawn at random, and examples of what was dropped
(DIR/drops). Nothing in DIR is changed. Several directories make one page: slices of a list, or parts of a set.
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
    """Writes the page. -> its bytes. Raises ValueError for a directory without shards, a broken shard, a damaged record
    of a step."""
    if samples < 0:
        raise ValueError(f"--samples={samples} is below 0; use 60, or 0 for none")
    try:
        detect = detector()
    except ValueError:  # the page says that it is not installed
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
    parser.add_argument("--samples", type=int, default=60, metavar="N", help="drawn at random, to show (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, other samples (%(default)s)")
    add_workers(parser)
    args = parser.parse_args(arguments)
    return run(lambda: _run(args), left="no page was written")


def _run(args: argparse.Namespace) -> None:
    size = audit(args.directories, args.out, seed=args.seed, samples=args.samples, workers=args.workers)
    print(f"{args.out}: {size / 2**20:.1f} MiB, open it in any browser")


if __name__ == "__main__":
    sys.exit(main())
