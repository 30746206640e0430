"""Memory and time of a vocabulary's head, forward and backward: in chunks, as training runs it, and over whole logits.

    python -m benchmarks.head --rows 8192 --classes 64010 --dtype bf16

Each way runs in a process of its own; its memory is the highest above what was there before the first pass (on a GPU:
what torch allocated, on a CPU: what the process held), without rows, weight and bias. Differences are the largest ones
between the two ways' losses, and between their gradients over the largest number in them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.record import machine, peak_bytes
from pretrain import command, cross_entropy
from pretrain.command import about, write

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = ("whole", "chunks")


def inputs(args: argparse.Namespace) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    where, dtype = args.device, DTYPES[args.dtype]
    rows = torch.randn(args.rows, args.dim, generator=generator).to(where, dtype).requires_grad_()
    weight = torch.randn(args.classes, args.dim, generator=generator).mul_(0.02).to(where, dtype).requires_grad_()
    bias = torch.zeros(args.classes, dtype=dtype, device=where, requires_grad=True)
    targets = torch.randint(args.classes, (args.rows,), generator=generator).to(where)
    return rows, weight, bias, targets, torch.full((args.rows,), 1 / args.rows, device=where)


def passes(way: str, rows: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Forward and backward -> the total loss."""
    if way == "chunks":
        total = cross_entropy.linear_cross_entropy(rows, weight, bias, targets, weights, classes=len(weight)).total
    else:
        logits = F.linear(rows, weight, bias)
        total = (F.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
        logits.detach().argmax(-1)
        del logits
    total.backward()
    return total.detach()


def one_way(way: str, args: argparse.Namespace, results: Any) -> None:
    if args.chunk:
        cross_entropy.CHUNK = args.chunk
    given, times = inputs(args), []
    on_gpu = args.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else peak_bytes()
    for _ in range(args.repeats):
        for value in given[:3]:
            value.grad = None
        start = time.perf_counter()
        total = passes(way, *given)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = (torch.cuda.max_memory_allocated() if on_gpu else peak_bytes()) - before
    out = Path(args.place) / f"{way}.pt"
    torch.save([total.cpu(), *(value.grad.cpu() for value in given[:3] if value.grad is not None)], out)
    results.put((peak, min(times)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    figures: dict[str, Any] = {}
    peaks = []
    for way in WAYS:
        results = context.Queue()
        process = context.Process(target=one_way, args=(way, args, results))
        process.start()
        process.join()
        if process.exitcode:
            raise ValueError(f"the run with {way} ended with exit code {process.exitcode}; use less --rows")
        peak, seconds = results.get()
        figures[way] = {"memory_gib": round(peak / 2**30, 3), "seconds": round(seconds, 3)}
        peaks.append(max(peak, 1))
    whole, chunks = (torch.load(Path(args.place) / f"{way}.pt", weights_only=True) for way in WAYS)
    away = [
        float((a.float() - b.float()).abs().max() / a.float().abs().max()) for a, b in zip(whole, chunks, strict=True)
    ]
    names = ("loss", "rows", "weight", "bias")
    figures["difference"] = {name: float(f"{value:.1e}") for name, value in zip(names, away, strict=True)}
    figures["memory_ratio"] = round(peaks[0] / peaks[1], 2)
    figures["time_ratio"] = round(figures["whole"]["seconds"] / max(figures["chunks"]["seconds"], 1e-3), 2)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = command.make_parser("benchmarks.head", __doc__, "--rows 512 --classes 8192 --dtype fp32")
    parser.add_argument("--rows", type=int, default=8192, help="hidden words of a micro-batch (%(default)s)")
    parser.add_argument("--dim", type=int, default=768, help="(%(default)s)")
    parser.add_argument("--classes", type=int, default=64010, help="(%(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="(%(default)s)")
    parser.add_argument("--chunk", type=int, help=f"logits at once ({cross_entropy.CHUNK})")
    parser.add_argument("--repeats", type=int, default=2, help="the fastest counts (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    for name in ("rows", "dim", "classes", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name}={getattr(args, name)} is below 1; use 1 or more")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory(prefix="head") as args.place:
        figures = measure(args)
    sizes = {name: getattr(args, name) for name in ("rows", "dim", "classes", "dtype", "device")}
    sizes["chunk"] = args.chunk or cross_entropy.CHUNK
    write({**about("benchmarks.head", argv), **machine("torch"), **sizes, **figures}, args.out)


if __name__ == "__main__":
    sys.exit(main())
