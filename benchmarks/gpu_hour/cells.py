"""The cells of each part of the first GPU hour, those first that tell the most. Each is the line of a benchmark.

What a cell is compared with stands in the same part, so that both come from one machine. `toy` is added to a line by
--toy: of an argument that is given twice the last one counts.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """`line`: module and arguments, to which --out FILE is added. `toy`: further ones, for a CPU. `limit_s`: seconds
    after which it is ended."""

    name: str
    line: str
    toy: str
    limit_s: int = 180

    def words(self, toy: bool) -> list[str]:
        """What follows `python -m`."""
        return shlex.split(f"{self.line} {self.toy}" if toy else self.line)


STEPS = "--steps 20 --warmup 5 --samples 128 --set loading.workers=12"
TOY_STEPS = (
    "--recipe tiny --stage fusion --steps 1 --warmup 1 --samples 4 --set compile=false --set loading.workers=0 "
    "--set batch.images=2 --set batch.pairs=2 --set batch.texts=2 --set batch.accumulation=1"
)


def batch(each: int, accumulation: int = 1) -> str:
    """Settings for `each` sequences of every kind in a micro-batch, `accumulation` micro-batches a step."""
    kinds = " ".join(f"--set batch.{kind}={each * accumulation}" for kind in ("images", "pairs", "texts"))
    return f"{kinds} --set batch.accumulation={accumulation}"


def steps(
    name: str,
    more: str = "",
    *,
    recipe: str = "beit3_base",
    ds: str = "zero1_bf16",
    each: int = 64,
    micro_steps: int | None = None,
    toy: str = TOY_STEPS,
    limit_s: int = 180,
) -> Cell:
    """Steps of `each` sequences of every kind in a micro-batch; None: as many micro-steps as make 768 sequences. A `ds`
    with a slash is a file of its own."""
    sizes = batch(each, micro_steps or 256 // each)
    path = ds if "/" in ds else f"ds_configs/{ds}.json"
    line = f"benchmarks.throughput --recipe {recipe} --stage pretrain --ds {path} {STEPS} {sizes} {more}"
    return Cell(name, line, toy, limit_s)


def ceiling(measure: str, size: int) -> Cell:
    return Cell(measure, f"benchmarks.gpu_hour.ceilings {measure}", f"--size {size}", limit_s=60)


def encoder(size: str, each: int = 64) -> Cell:
    kinds = f"--images {each} --pairs {each} --texts {each} --pair-len 64 --text-len 196"
    line = f"benchmarks.attention --size {size} {kinds} --dtype bf16 --repeats 10"
    toy = "--size quickstart --images 1 --pairs 1 --texts 1 --pair-len 8 --text-len 8 --dtype fp32 --repeats 1"
    return Cell(f"encoder {size}", line, toy, limit_s=120)


def head(classes: int) -> Cell:
    line = f"benchmarks.head --rows 8192 --classes {classes} --dtype bf16 --repeats 5"
    return Cell(f"head {classes}", line, "--rows 32 --dim 8 --classes 40 --chunk 400 --dtype fp32", limit_s=120)


def tests(name: str, where: str) -> Cell:
    """Tests in a process of their own, since an error of CUDA spoils all that follows it."""
    toy = "-m 'not cuda' tests/test_conftest.py -k only_the_tests_of_a_gpu"  # -k drops all others
    return Cell(name, f"benchmarks.gpu_hour.suite -m cuda {where}", toy, limit_s=240)


def loader(side: int, samples: int) -> Cell:
    line = f"benchmarks.loader --workers 1 2 4 8 15 --side {side} --samples {samples} --seconds 6"
    return Cell(f"{side} px", line, "--workers 0 --side 32 --samples 8 --size 32 --batch 4 --seconds 0.05")


def large(name: str, more: str = "", *, ds: str = "zero1_bf16", each: int = 32) -> Cell:
    return steps(name, f"--stored-codes {more}", recipe="beit3_large", ds=ds, each=each, limit_s=240)


def giant(name: str, ds: str) -> Cell:
    """A few steps, of 96 sequences each."""
    few = "--stored-codes --steps 5 --warmup 2"
    return steps(name, few, recipe="beit3_giant", ds=ds, each=8, micro_steps=4, limit_s=280)


# VLMo's stage of masked data, `fusion`, reads pairs only.
VLMO = Cell(
    "VLMo",
    "benchmarks.throughput --recipe vlmo_base --stage fusion --ds ds_configs/zero1_bf16.json "
    f"{STEPS} --set batch.pairs=256 --set batch.accumulation=4 --stored-codes",
    TOY_STEPS,
)
# DeepSpeed compiles the whole task, which no CPU can try: a toy goes without.
DEEPCOMPILE = steps(
    "all, DeepCompile",
    "--stored-codes",
    ds="benchmarks/gpu_hour/deepcompile.json",
    toy=f"{TOY_STEPS} --ds ds_configs/zero1_bf16.json",
    limit_s=300,
)
# Switches off all that made a step faster; the cell of one gain switches off the others.
BEFORE = "--without vocabulary overflow fusing --set compile=false"
PARTS: dict[str, tuple[Cell, ...]] = {
    "ceilings": (
        ceiling("products", 32),
        encoder("base"),
        ceiling("launches", 16),
        ceiling("indexes", 64),
        ceiling("vocabulary", 8),
        ceiling("copies", 16),
        head(64128),
        head(64010),
        encoder("base_released"),
        encoder("vlmo_base"),
        encoder("large", 32),
    ),
    "tests": (
        tests("attention", "tests/cuda/test_attention.py tests/models/test_attention.py"),
        tests("waits", "tests/run/test_waits.py tests/parallel/test_copy_ahead.py"),
        tests("compiled", "tests/cuda/test_compiled.py"),
        tests("codes", "tests/cuda/test_codes.py"),
        tests("runs", "tests/cuda/test_runs.py"),
    ),
    "throughput": (
        steps("all", "--stored-codes"),
        steps("as it was", BEFORE),
        steps("codes", f"--stored-codes {BEFORE}"),
        steps("compile", "--without vocabulary overflow fusing --set compile=true"),
        steps("all, micro-batch of 128", "--stored-codes", each=128),
        steps("all, micro-batch of 256", "--stored-codes", each=256),
        steps("overflow", "--without vocabulary fusing --set compile=false"),
        steps("vocabulary", "--without overflow fusing --set compile=false"),
        steps("fusing", "--without vocabulary overflow --set compile=false"),
        steps("all, codes in each step"),
        steps("all, ZeRO-2", "--stored-codes", ds="zero2_bf16"),
        steps("all, ZeRO-3", "--stored-codes", ds="zero3_bf16"),
        DEEPCOMPILE,
        steps("released", "--stored-codes", recipe="beit3_base_released"),
        VLMO,
        steps("all, checkpointing", "--stored-codes --set activation_checkpointing=1"),
        steps("all, deterministic", "--stored-codes --set deterministic=true"),
        steps("all, fp32 by TF32", "--stored-codes --set tf32=true", ds="zero1"),
    ),
    "sizes": (
        large("large"),
        giant("giant, ZeRO-3", "zero3_bf16"),
        large("large, checkpointing", "--set activation_checkpointing=1", each=64),
        large("large, ZeRO-3", ds="zero3_bf16"),
        giant("giant, offload", "zero3_offload"),
    ),
    "loader": (loader(256, 512), loader(500, 256)),
    "quickstart": (Cell("quickstart", "benchmarks.gpu_hour.quickstart", "--set steps=2", limit_s=600),),
}
