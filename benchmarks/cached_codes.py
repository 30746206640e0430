"""The gain of stored codes: training steps that run the visual tokenizer, and steps that read its codes from disk.

    python -m benchmarks.cached_codes --recipe tiny --stage fusion --ds ds_configs/zero0.json
    python -m benchmarks.cached_codes --recipe beit3_base --stage pretrain --ds ds_configs/zero1.json --crops 2 \\
        --set batch.images=8 --set batch.pairs=8 --set batch.texts=8 --set batch.accumulation=1 --steps 5

Both see the same pictures and alternate. One process, on benchmarks.throughput's synthetic shards.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.throughput import run, store_codes, with_looks, write_shards, write_visual_tokenizer
from pretrain import command
from pretrain.command import about, write
from pretrain.recipes import load_recipe


def measure(args: argparse.Namespace) -> dict:
    """Medians over the rounds. Raises ValueError for a stage that predicts no codes."""
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    if stage.visual_tokenizer is None:
        raise ValueError(f"--stage {args.stage} has no visual_tokenizer, so it needs no codes; name one that has")
    stage = replace(stage, init_from=None, visual_tokenizer="tokenizer")
    with tempfile.TemporaryDirectory(prefix="cached_codes") as name:
        place = Path(name)
        os.environ["DATA"] = name
        write_shards(place, stage)
        write_visual_tokenizer(recipe, stage, place)
        pictures, seconds = store_codes(recipe, stage, place, args.crops)
        runs: dict[str, list[dict]] = {"online": [], "stored": []}
        for _ in range(args.rounds):
            for kind, results in runs.items():
                stage_with_looks = with_looks(stage, args.crops, "codes" if kind == "stored" else None)
                results.append(run(args, recipe, stage_with_looks, place))
    milliseconds = {
        kind: statistics.median(result["ms_per_step"]["median"] for result in results) for kind, results in runs.items()
    }
    facts = ("machine", "torch", "ranks", "parameters", "batch", "model")
    return {
        "crops": args.crops,
        "rounds": args.rounds,
        "steps": args.steps,
        "ms_per_step": milliseconds,
        "data_wait": {kind: statistics.median(r["data_wait"] for r in results) for kind, results in runs.items()},
        "speedup": milliseconds["online"] / milliseconds["stored"],
        "encode_looks_per_s": pictures * args.crops / seconds,
        **{name: runs["online"][0][name] for name in facts},
    }


def main(argv: list[str] | None = None) -> int:
    parser = command.make_parser("benchmarks.cached_codes", __doc__, "--recipe tiny --stage fusion --rounds 1")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--stage", default="fusion")
    parser.add_argument("--ds", default="ds_configs/zero0.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--crops", type=int, default=2, help="crops of each picture (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per run (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps per run (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    result = measure(args)
    print(f"{'codes':<8}{'ms/step':>10}{'data wait':>12}")
    for kind, median in result["ms_per_step"].items():
        print(f"{kind:<8}{median:>10.1f}{result['data_wait'][kind]:>12.3f}")
    print(f"stored codes make a step {result['speedup']:.2f} times as fast")
    write({**about("benchmarks.cached_codes", argv), **result}, args.out, show=False)


if __name__ == "__main__":
    sys.exit(main())
