"""The memory that each rank needs to build a recipe's task under ZeRO-3, which splits every parameter over the ranks as
it is created, so that no rank ever has the whole model. Starts its own CPU ranks (gloo) on one machine.

    python -m benchmarks.build_memory --recipe beit3_giant --ranks 4

The peak is the process's highest resident memory (ru_maxrss) above that before building, with everything imported. The
whole is the bytes of all parameters in fp32, as in a process without ZeRO-3. While torch's trunc_normal_ initialises a
matrix it needs up to four copies of it (it redraws values outside the bounds): with few ranks and a large vocabulary
the peak is that, not the rank's share.

The ranks run with MALLOC_MMAP_THRESHOLD_=1048576: by default glibc does not return freed blocks of up to 32 MB, and
these holes would dominate the peak. The same setting helps a real run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import machine, peak_bytes
from pretrain.command import about, make_parser, run, write

GIB = 2**30
CONFIG = {"zero_optimization": {"stage": 3}}
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # read by glibc as a process starts


def measure(recipe: str, stage: str, settings: list[str], ranks: int, timeout_s: float) -> dict[str, Any]:
    """Peak GiB of each rank and of the whole model. Raises ValueError when a rank fails or does not finish in time."""
    context = multiprocessing.get_context("spawn")
    os.environ.update(RETURN_MEMORY)
    with tempfile.TemporaryDirectory(prefix="build_memory") as name:
        place = Path(name)
        (place / "zero3.json").write_text(json.dumps(CONFIG))
        job = (place, recipe, stage, settings, ranks)
        processes = [context.Process(target=_rank, args=(number, *job)) for number in range(ranks)]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        try:
            while any(process.is_alive() for process in processes) and not list(place.glob("*.error")):
                if time.monotonic() > deadline:
                    raise ValueError(f"{ranks} ranks did not finish in {timeout_s:.0f} s; use a larger --timeout")
                time.sleep(0.1)
        finally:
            for process in processes:
                process.join(1)
                if process.is_alive():
                    process.kill()
                    process.join()
        errors = [path.read_text() for path in sorted(place.glob("*.error"))]
        if errors or any(process.exitcode for process in processes):
            raise ValueError(f"a rank failed: {(errors or ['it was killed, perhaps because memory ran out'])[0]}")
        results = [json.loads((place / f"{number}.json").read_text()) for number in range(ranks)]
    whole = results[0]["parameters"] * 4
    peaks = [result["peak_bytes"] for result in results]
    return {
        "parameters": results[0]["parameters"],
        "whole_gib": round(whole / GIB, 3),
        "peak_gib": [round(peak / GIB, 3) for peak in peaks],
        "share_gib": [round(result["share_bytes"] / GIB, 3) for result in results],
        "peak_of_whole": round(max(peaks) / whole, 3),
        "build_s": round(max(result["seconds"] for result in results), 1),
    }


def _rank(number: int, place: Path, recipe_name: str, stage_name: str, settings: list[str], ranks: int) -> None:
    os.environ.update(RANK=str(number), WORLD_SIZE=str(ranks), LOCAL_RANK=str(number), CUDA_VISIBLE_DEVICES="")
    try:
        import torch.distributed as dist

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=number, world_size=ranks)
        from pretrain.parallel.ds_config import load_ds_config
        from pretrain.parallel.engine import partitioned_init
        from pretrain.recipes import load_recipe
        from pretrain.tasks.pretrain import PretrainTask

        recipe, stage = load_recipe(recipe_name, stage_name, settings)
        config = load_ds_config(place / "zero3.json", micro=1, accumulation=1, world=ranks, clip=0)
        with partitioned_init(config):
            torch.nn.Linear(8, 8)  # imports and sets up what is not part of the model
        dist.barrier()
        before, start = peak_bytes(), time.monotonic()
        with partitioned_init(config):
            task = PretrainTask(recipe.model_of(stage), stage.experts, stage.objectives)
        seconds = time.monotonic() - start
        result = {
            "parameters": sum(value.ds_numel for value in task.parameters()),
            "share_bytes": sum(value.ds_tensor.nbytes for value in task.parameters()),
            "peak_bytes": peak_bytes() - before,
            "seconds": seconds,
        }
        (place / f"{number}.json").write_text(json.dumps(result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        last = traceback.format_exc().strip().splitlines()[-1]
        (place / f"{number}.writing").write_text(last)
        (place / f"{number}.writing").rename(place / f"{number}.error")
        os._exit(1)  # without waiting for the other ranks, which the parent ends


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.build_memory", __doc__, "--recipe beit3_base --ranks 2")
    parser.add_argument("--recipe", default="beit3_giant", help="(%(default)s)")
    parser.add_argument("--stage", default="pretrain", help="(%(default)s)")
    parser.add_argument("--ranks", type=int, default=4, help="CPU processes (%(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a field of the recipe")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds (%(default)g)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    return run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    if args.ranks < 1:
        raise ValueError(f"--ranks={args.ranks} is below 1; use 1 or more")
    from pretrain.recipes import load_recipe

    if not load_recipe(args.recipe, args.stage, args.set)[1].objectives:
        raise ValueError(f"--stage {args.stage} trains a visual tokenizer; name one that trains the encoder")
    result = measure(args.recipe, args.stage, args.set, args.ranks, args.timeout)
    facts = about("benchmarks.build_memory", argv) | machine("torch")
    write({**facts, "ranks": args.ranks, "environment": RETURN_MEMORY, **result}, args.out)


if __name__ == "__main__":
    sys.exit(main())
