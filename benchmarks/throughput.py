"""Training speed through the real loader, visual tokenizer, engine and train_step, on synthetic shards.

    python -m benchmarks.throughput --recipe beit3_base --stage pretrain --ds ds_configs/zero3_bf16.json \\
        --set batch.images=64 --set batch.pairs=64 --set batch.texts=64 --set batch.accumulation=1
    torchrun --nproc-per-node 8 -m benchmarks.throughput ...      the same on a whole node

Pictures are smooth noise of 256 pixels, texts random words, the visual tokenizer has random weights: what is timed does
the work of a real step, what comes out means nothing. Reported are medians over the steps after the warmup. `mfu`
counts padding, `mfu_real` does not; `planned_memory_gib` is what pretrain.plan counts for a GPU.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from benchmarks.before import GAINS, without
from data_tools.train_text_tokenizer import train as train_text_tokenizer
from pretrain import command
from pretrain.checkpoint.weights import WEIGHTS, write_weights
from pretrain.command import about, write
from pretrain.config import Recipe, Stage, to_json
from pretrain.data.shards.indexing import index_directory
from pretrain.data.sources import TextShards
from pretrain.distributed import barrier, device, rank, world_size
from pretrain.encode_images import encode_directory, load_encoder
from pretrain.flops import StepFlops
from pretrain.layers import PLAIN
from pretrain.metrics import Throughput
from pretrain.models.visual_tokenizer.vqkd import VQKDConfig
from pretrain.parallel.ds_config import precision
from pretrain.parallel.faults import Watch
from pretrain.parallel.launcher import adopt_launcher
from pretrain.parallel.share_batches import share_batches
from pretrain.plan.hardware import GIB
from pretrain.plan.memory import Cell, peak_memory
from pretrain.plan.model import planned
from pretrain.recipes import load_recipe
from pretrain.run.build import Run, build_run
from pretrain.run.image_targets import predicts_codes
from pretrain.run.memory import memory_suffices
from pretrain.settings import fill_variables

SHARDS, SAMPLES, SIDE = 8, 256, 256
WORDS = [f"{a}{b}" for a in ("ka", "lo", "mi", "tu", "re", "so") for b in ("n", "ra", "vik", "del", "po", "shi", "mar")]


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    return command.run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    adopt_launcher()
    result = measure(args)
    if rank() == 0:
        write({**about("benchmarks.throughput", argv), **result}, args.out)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    example = "--recipe tiny --stage fusion --ds ds_configs/zero0.json --steps 5"
    parser = command.make_parser("benchmarks.throughput", __doc__, example)
    parser.add_argument("--recipe", default="beit3_base")
    parser.add_argument("--stage", default="pretrain")
    parser.add_argument("--ds", default="ds_configs/zero3_bf16.json")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--steps", type=int, default=50, help="timed steps")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock starts")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"in each of {SHARDS} shards (%(default)s)")
    parser.add_argument("--stored-codes", action="store_true", help="the visual tokenizer runs before, not in a step")
    parser.add_argument("--without", nargs="+", choices=GAINS, default=[], help="a step as it was before these gains")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict:
    recipe, stage = load_recipe(args.recipe, args.stage, args.set)
    for name, least in (("steps", 1), ("warmup", 0), ("samples", 1)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name}={getattr(args, name)} is below {least}; use {least} or more")
    if args.stored_codes and stage.visual_tokenizer is None:
        raise ValueError(f"--stored-codes: --stage {args.stage} predicts no codes; leave it out, or name one that does")
    with tempfile.TemporaryDirectory(prefix="throughput") as name:
        # Every rank writes its own copy: no shared disk is asked for, and the order is the same everywhere.
        place = Path(name)
        os.environ["DATA"] = str(place)
        write_shards(place, stage, args.samples)
        write_visual_tokenizer(recipe, stage, place)
        stage = replace(stage, init_from=None)
        if args.stored_codes:
            stage = replace(stage, visual_tokenizer="tokenizer")
            store_codes(recipe, stage, place, crops=1)
            stage = with_looks(stage, 1, "codes")
        with without(args.without), memory_suffices(stage):
            return run(args, recipe, stage, place)


def run(args: argparse.Namespace, recipe: Recipe, stage: Stage, place: Path) -> dict:
    """The steps of the run that pretrain.train would make, without its metrics and checkpoints."""
    watch = Watch()
    run = build_run(recipe, stage, args.ds, place, watch)
    meter, seconds, waits, real, flops = Throughput(device(), run.mesh.data.size), [], [], [], []
    batches = share_batches(partial(run.loader.batches, 0, args.warmup + args.steps), run.mesh, watch)
    for step in range(1, args.warmup + args.steps + 1):
        watch.enter(f"step {step}", patient=step == 1)
        begin = time.perf_counter()
        micro_batches = next(batches)
        waited = time.perf_counter() - begin
        run.step(micro_batches, first=step == 1)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if step > args.warmup:
            seconds.append(time.perf_counter() - begin)
            waits.append(waited)
            real.append(sum(batch.real_rows() for batch in micro_batches))
            flops.append(run.flops(micro_batches))
    watch.enter("the end", patient=True)
    barrier()
    watch.stop()
    middle = statistics.median(seconds)
    mean = StepFlops(*map(statistics.mean, zip(*flops, strict=True)))
    return {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU",
        "torch": torch.__version__,
        "ranks": world_size(),
        "data_ranks": run.mesh.data.size,
        "parameters": parameters(run),
        "batch": stage.batch.counts(),
        "steps": args.steps,
        "ms_per_step": {"median": 1e3 * middle, "min": 1e3 * min(seconds), "max": 1e3 * max(seconds)},
        "samples_per_s": stage.batch.total / middle,
        "tokens_per_s": run.rows * run.mesh.data.size / middle,
        "real_tokens_per_s": statistics.mean(real) * run.mesh.data.size / middle,  # without padding
        "tflops_per_rank": mean.padded / middle / 1e12,
        "real_tflops_per_rank": mean.real / middle / 1e12,  # without padding
        "executed_tflops_per_rank": mean.executed / middle / 1e12,
        **meter.mfu(mean, middle),
        "memory_gib": meter.read()["memory_gib"],
        "planned_memory_gib": planned_memory(run),
        "data_wait": sum(waits) / sum(seconds),
        "model": to_json(recipe.model_of(stage)),
    }


def planned_memory(run: Run) -> float | None:
    """GiB on a GPU by pretrain.plan; None for a task that it does not plan."""
    recipe, stage = run.recipe, run.stage
    if recipe.model_of(stage).splits(stage.experts) is None:
        return None
    pictures = [source for source in stage.mix.values() if not isinstance(source, TextShards)]
    cell = Cell(
        run.ds_config,
        stage.parallel,
        run.mesh.data.size,
        run.loader.layout,
        stage.batch.accumulation,
        int(stage.activation_checkpointing),
        packed=precision(run.ds_config) != torch.float32,
        targets=predicts_codes(stage) and not all(getattr(source, "codes", None) for source in pictures),
    )
    return peak_memory(planned(recipe, stage), cell).total / GIB


def parameters(run: Run) -> int:
    """Of the whole model, whatever part of it this rank holds."""
    model = run.recipe.model_of(run.stage)
    with torch.device("meta"):
        task = run.stage.task.build(model, run.stage, PLAIN, None)
    return sum(value.numel() for value in task.parameters())


def store_codes(recipe: Recipe, stage: Stage, place: Path, crops: int) -> tuple[int, float]:
    """The codes of every source with pictures, beside its shards -> (pictures, seconds)."""
    encoder = load_encoder(recipe, stage, str(place / "tokenizer"), crops, "codes")
    start, pictures = time.perf_counter(), 0
    for source in stage.mix.values():
        patterns = () if isinstance(source, TextShards) else source.shards
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            directory = Path(fill_variables(pattern, "shards"))
            pictures += encode_directory(directory, encoder, workers=recipe.loading.processes).pictures
    return pictures, time.perf_counter() - start


def with_looks(stage: Stage, crops: int, codes: str | None) -> Stage:
    """The stage with `crops` fixed crops of each picture, and the stored codes of this name, if any."""
    mix = {
        kind: source if isinstance(source, TextShards) else replace(cast(Any, source), crops=crops, codes=codes)
        for kind, source in stage.mix.items()
    }
    return replace(stage, mix=mix)


def write_shards(place: Path, stage: Stage, samples: int = SAMPLES) -> None:
    """What the stage's mix reads, with $DATA at `place`, `samples` in each shard; and $DATA/text.model."""
    texts = []
    for kind, source in stage.mix.items():
        members = "pairs" if kind == "dual" else kind
        for pattern in (source.shards,) if isinstance(source.shards, str) else source.shards:
            directory = Path(os.path.expandvars(pattern))
            directory.mkdir(parents=True)
            texts += [str(directory)] if kind != "images" else []
            for shard in range(SHARDS):
                with tarfile.open(directory / f"{shard:05d}.tar", "w") as tar:
                    for name, data in _members(members, shard, samples):
                        info = tarfile.TarInfo(name)
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
            index_directory(directory)
    if texts:
        train_text_tokenizer(texts, place / "text.model", 64, model_type="bpe")


def _members(kind: str, shard: int, samples: int) -> Iterator[tuple[str, bytes]]:
    random = np.random.default_rng([shard, len(kind)])
    for sample in range(samples):
        key = f"{shard:05d}{sample:04d}"
        if kind != "texts":
            coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), dtype=np.uint8))
            data = io.BytesIO()
            coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
            yield f"{key}.jpg", data.getvalue()
        if kind != "images":
            count = 20 if kind == "pairs" else 300
            yield f"{key}.txt", " ".join(WORDS[i] for i in random.integers(0, len(WORDS), count)).encode()


def write_visual_tokenizer(recipe: Recipe, stage: Stage, place: Path) -> None:
    """The recipe's tokenizer with random weights, where a stage looks for the stage `tokenizer`."""
    named, model = recipe.stages.get("tokenizer"), recipe.model_of(stage)
    default = VQKDConfig(image_size=model.image_size, patch_size=model.patch_size)
    config = named.model if named and isinstance(named.model, VQKDConfig) else default
    (place / "tokenizer").mkdir()
    state = {f"tokenizer.{name}": value for name, value in config.build().state_dict().items()}
    write_weights(state, place / "tokenizer" / WEIGHTS, {"model": to_json(config)})


if __name__ == "__main__":
    sys.exit(main())
