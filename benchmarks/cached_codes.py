"""What stored codes save: the training step with the visual tokenizer run online, and with its codes read from disk.

    python -m benchmarks.cached_codes --recipe tiny --stage fusion --ds ds_configs/zero0.json
    python -m benchmarks.cached_codes --recipe beit3_base --stage pretrain --ds ds_configs/zero1.json --crops 2 \\
        --set batch.images=8 --set batch.pairs=8 --set batch.texts=8 --set batch.accumulation=1 --steps 5

Both see the same pictures; the two kinds of run take turns. One process, on benchmarks.throughput's synthetic shards.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from benchmarks.throughput import run, write_shards, write_visual_tokenizer
from pretrain import command
from pretrain.command import about, write
from pretrain.config import Recipe, Stage
from pretrain.data.sources import TextShards
from pretrain.encode_images import encode_directory, load_encoder
from pretrain.recipes import load_recipe
from pretrain.settings import fill_variables


def measure(args: argparse.Namespace) -> dict:
    """Medians over the rounds; raises ValueError for a stage that predicts no codes."""
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    if stage.visual_tokenizer is None:
        raise ValueError(f"--stage {args.stage} has no visual_tokenizer, so it needs no codes; name one that has")
    stage = replace(stage, init_from=None, visual_tokenizer="tokenizer")
    with tempfile.TemporaryDirectory(prefix="cached_codes") as name:
        place = Path(name)
        os.environ["DATA"] = name
        write_shards(place, stage)
        write_visual_tokenizer(recipe, stage, place)
        pictures, seconds = encode(args, recipe, stage, place)
        found: dict[str, list[dict]] = {"online": [], "stored": []}
        for _ in range(args.rounds):
            for kind, results in found.items():
                seen = with_looks(stage, args.crops, "codes" if kind == "stored" else None)
                results.append(run(args, recipe, seen, place))
    milliseconds = {
        kind: statistics.median(result["ms_per_step"]["median"] for result in results)
        for kind, results in found.items()
    }
    facts = ("machine", "torch", "ranks", "parameters", "batch", "model")
    return {
        "crops": args.crops,
        "rounds": args.rounds,
        "steps": args.steps,
        "ms_per_step": milliseconds,
        "data_wait": {kind: statistics.median(r["data_wait"] for r in results) for kind, results in found.items()},
        "speedup": milliseconds["online"] / milliseconds["stored"],
        "encode_looks_per_s": pictures * args.crops / seconds,
        **{name: found["online"][0][name] for name in facts},
    }


def encode(args: argparse.Namespace, recipe: Recipe, stage: Stage, place: Path) -> tuple[int, float]:
    """(pictures, seconds): the codes of every source with pictures."""
    encoder = load_encoder(recipe, stage, str(place / "tokenizer"), args.crops, "codes")
    start, pictures = time.perf_counter(), 0
    for source in stage.mix.values():
        patterns = () if isinstance(source, TextShards) else source.shards
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            directory = Path(fill_variables(pattern, "shards"))
            pictures += encode_directory(directory, encoder, workers=recipe.loading.workers).pictures
    return pictures, time.perf_counter() - start


def with_looks(stage: Stage, crops: int, codes: str | None) -> Stage:
    mix = {
        kind: source if isinstance(source, TextShards) else replace(cast(Any, source), crops=crops, codes=codes)
        for kind, source in stage.mix.items()
    }
    return replace(stage, mix=mix)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cached_codes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--stage", default="fusion")
    parser.add_argument("--ds", default="ds_configs/zero0.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--crops", type=int, default=2, help="looks at each picture (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a run (%(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before the clock starts (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args, argv), left="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    result = measure(args)
    print(f"{'codes':<8}{'ms/step':>10}{'data wait':>12}")
    for kind, middle in result["ms_per_step"].items():
        print(f"{kind:<8}{middle:>10.1f}{result['data_wait'][kind]:>12.3f}")
    print(f"stored codes make a step {result['speedup']:.2f} times as fast")
    write({**about("benchmarks.cached_codes", argv), **result}, args.out, shown=False)


if __name__ == "__main__":
    sys.exit(main())
