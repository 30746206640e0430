"""The family's claims, tested again on a small scale: which of them hold in a drawn world, with several seeds?

    python -m benchmarks.claims --run-dir runs/claims --out benchmarks/results/claims.json

    a  hard negatives beat random ones on matching (ALBEF, VLMo)
    b  stages beat joint pretraining on as many samples, and no pretraining (VLMo)
    c  attention trained on pictures and frozen serves texts (VLMo), and the other way round
    d  masked data alone beats contrast, matching and masked words, for as many FLOPs (BEiT-3)
    e  CapFilt recovers most of what 30 % wrong captions cost (BLIP)
    f  fusion experts in the three top layers beat none (VLMo, BEiT-3)

Draws the world of world.py, trains and evaluates the stages of recipe.py for each seed, each in one process of one
thread, and compares them as comparisons.py says: the same seed's scores are paired. A claim is "shown" where each
seed's difference is above 0 and their mean above twice its standard error, "contradicted" where the same holds below
0, and else "not shown". What was trained stays: the same line goes on after a kill, and with more --seeds. The JSON is
written after each run, a picture beside it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.claims.comparisons import COMPARISONS, row, table
from benchmarks.claims.picture import picture
from benchmarks.claims.runs import Runs, order, run_all
from benchmarks.claims.world import Sizes, make_corpus
from benchmarks.record import machine
from benchmarks.zoo import flops
from pretrain import command
from pretrain.files import write_file
from pretrain.visible import say

CLAIMS = tuple(dict.fromkeys(comparison.claim for comparison in COMPARISONS))


def record(runs: Runs, seeds: range, claims: list[str], facts: dict[str, Any], out: Path | None) -> dict[str, Any]:
    """Writes what is known so far, and returns it."""
    evaluated = runs.scores(seeds)
    rows = [row(comparison, evaluated) for comparison in COMPARISONS if comparison.claim in claims]
    noted = {stage: [runs.done(seed, stage) for seed in seeds] for stage in runs.recipe.stages}
    stages = {
        stage: {
            "steps": runs.steps(stage),
            "TFLOP": round(flops(runs.recipe, runs.recipe.stages[stage]) * runs.scale / 1e12, 2),
            "cpu_s": [each and each["cpu_s"] for each in dones],
        }
        for stage, dones in noted.items()
        if any(dones)
    }
    results = {"rows": rows, "stages": stages, "scale": runs.scale, **facts}
    command.write(results, out, show=False)
    if out is not None:
        write_file(out.with_suffix(".svg"), picture(rows).encode())
    return results


def measure(args: argparse.Namespace, arguments: list[str] | None) -> None:
    if args.seeds < 1 or args.jobs < 1:
        raise ValueError(f"--seeds {args.seeds} and --jobs {args.jobs} must be 1 or more")
    if not 0 < args.scale <= 100:
        raise ValueError(f"--scale {args.scale} is no share of the steps; use a number above 0, such as 0.1 or 2")
    runs, seeds = Runs(args.run_dir.absolute(), args.scale), range(args.seeds)
    make_corpus(runs.corpus, Sizes())
    os.environ |= runs.variables(0)  # for the recipe that this process reads; any seed's paths will do
    arms: dict[str, list[str]] = {claim: [] for claim in args.claims}
    for comparison in COMPARISONS:
        if comparison.claim in arms:
            arms[comparison.claim] += comparison.terms
    facts = command.about("benchmarks.claims", arguments) | machine("torch")
    wanted = order(runs, arms, seeds)

    def tell(seed: int, stage: str) -> None:
        stages = record(runs, seeds, args.claims, facts, args.out)["stages"]
        trained = sum(seconds is not None for each in stages.values() for seconds in each["cpu_s"])
        say(f"seed {seed}, {stage}: done, {trained} of {len(wanted)} runs")

    run_all(runs, wanted, args.jobs, tell)
    print(table(record(runs, seeds, args.claims, facts, args.out)["rows"]))


def main(arguments: list[str] | None = None) -> int:
    parser = command.make_parser("benchmarks.claims", __doc__, "--run-dir runs/claims --seeds 3 --jobs 2")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/claims"), help="corpus and runs (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="0 to N - 1 (%(default)s)")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="in this order (all)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (%(default)s)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the recipe's steps (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON, written after each run; the picture lies beside it")
    args = parser.parse_args(arguments)
    return command.run(lambda: measure(args, arguments), state="what was trained stays; the same line goes on")


if __name__ == "__main__":
    sys.exit(main())
