"""What DeepSpeed's optimizer step asks of the host, counted: calls of torch's operators, numbers read on the host (on a
GPU each is a wait), and waits for the device. By DeepSpeed's own defaults, and as load_ds_config and
pretrain/parallel/skipping.py have it. Counts need no GPU and depend on no machine.

    python -m benchmarks.step_calls --ds ds_configs/zero1_bf16.json

The model has base's blocks (12, of which 3 with a fusion expert, so base's number of parameters), 64 wide.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.record import machine
from pretrain import command
from pretrain.batch import Layout, make_batch
from pretrain.command import about, write
from pretrain.models.multiway.shape import EXPERTS
from pretrain.models.multiway.sizes import BEIT3_BASE
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim, build_optimizer, schedule
from pretrain.parallel import engine as door
from pretrain.parallel.ds_config import load_ds_config, precision
from pretrain.tasks.pretrain import PretrainTask

MODEL = replace(BEIT3_BASE, dim=64, heads=4, ffn_dim=128, image_size=32, vocab_size=128, max_text_len=16)
OPTIM, MICRO_STEPS = Optim(warmup_steps=2), 2
DEFAULTS = {"timers": {}, "wall_clock_breakdown": False}


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[call.overloadpacket.__name__] += 1
        return call(*args, **(kwargs or {}))


def count(ds: str, by_default: bool) -> dict[str, int]:
    """The counts of one step of two micro-steps, the last of four: the first ones set up state."""
    config = load_ds_config(ds, micro=6, accumulation=MICRO_STEPS, world=1, clip=OPTIM.clip)
    adapt = door.skip_on_device
    if by_default:
        config |= DEFAULTS
        if precision(config) == torch.bfloat16:
            config["bf16"] = {"enabled": True}
        door.skip_on_device = lambda engine: None
    try:
        task = PretrainTask(MODEL, EXPERTS, (MaskedData(image_codes=64),))
        engine = door.build_engine(task, build_optimizer(task, OPTIM), schedule(OPTIM, 10), config)
    finally:
        door.skip_on_device = adapt
    accelerator, waits = importlib.import_module("deepspeed.accelerator").get_accelerator(), [0]
    accelerator.synchronize = lambda *_: waits.append(1)
    batch = _batch()
    for _ in range(4):
        waits.clear()
        for _ in range(MICRO_STEPS):
            engine.backward(engine(batch)["loss"])
            with Calls() as calls:
                engine.step()
    return {
        "calls": calls.counts.total(),
        "host_reads": calls.counts["_local_scalar_dense"],
        "device_waits": len(waits),
        "trainable_parameters": len(list(task.parameters())),
    }


def _batch() -> Any:
    generator, layout = torch.Generator().manual_seed(0), Layout(2, 2, 2, MODEL.patches, pair_len=8, text_len=10)
    masks = torch.rand(4, MODEL.patches, generator=generator) < 0.4
    pairs, texts = (torch.randint(4, 128, (2, length), generator=generator) for length in (8, 10))
    return make_batch(
        layout,
        images=torch.randint(256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8),
        image_masks=masks,
        image_codes=torch.randint(64, masks.shape, generator=generator),
        pair_tokens=pairs,
        pair_masked=torch.rand(pairs.shape, generator=generator) < 0.5,
        text_tokens=texts,
        text_masked=torch.rand(texts.shape, generator=generator) < 0.5,
    )


def main(argv: list[str] | None = None) -> int:
    example = "--ds ds_configs/zero1_bf16.json"
    parser = command.make_parser("benchmarks.step_calls", __doc__, example)
    parser.add_argument("--ds", nargs="+", default=["ds_configs/zero1_bf16.json"], help="(%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    steps = {Path(ds).stem: {"defaults": count(ds, True), "here": count(ds, False)} for ds in args.ds}
    write({**about("benchmarks.step_calls", argv), **machine("torch", "deepspeed"), "steps": steps}, args.out)


if __name__ == "__main__":
    sys.exit(main())
