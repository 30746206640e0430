"""What the device itself can do, one measure at a time: the bounds that a training step is judged by.

    python -m benchmarks.gpu_hour.ceilings products

products: a square matrix product, TFLOP/s and its share of the data sheet's peak. copies: GB/s read and written on the
device, and GB/s from pinned memory of the host. vocabulary: a head's three products with 64010, 64064 and 64128
classes. indexes: a permutation of rows by index_add_, whose bf16 atomics may be slow, and by index_copy_. launches:
small kernels per second. The fastest of some repeats counts.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import seconds
from benchmarks.record import machine
from pretrain import command
from pretrain.command import about, write
from pretrain.flops import peak_flops

CLASSES, WIDTH = (64010, 64064, 64128), 768  # multiples of 2, of 64, and of 128 as pretrain/layers.py pads
REPEATS, LAUNCHES = 10, 1000


def products(size: int, device: str) -> dict[str, Any]:
    """[size, size] times [size, size]: TFLOP/s in bf16, and in fp32 without and with TF32."""
    figures: dict[str, Any] = {"size": size}
    tf32 = torch.backends.cuda.matmul.allow_tf32
    try:
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("tf32", torch.float32)):
            torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
            a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
            figures[f"{name}_tflops"] = 2 * size**3 / _fastest(partial(torch.mm, a, b), device) / 1e12
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
    peak = peak_flops(torch.device(device))
    figures["bf16_share_of_peak"] = figures["bf16_tflops"] * 1e12 / peak if peak else None
    return figures


def copies(size: int, device: str) -> dict[str, Any]:
    """Copies of size x size numbers of 4 bytes: on the device, and from pinned memory of the host."""
    a, b = (torch.ones(size, size, device=device) for _ in range(2))
    host = torch.ones(size, size, pin_memory=device == "cuda")
    return {
        "bytes": a.nbytes,
        "device_gb_per_s": 2 * a.nbytes / _fastest(lambda: b.copy_(a), device) / 1e9,
        "from_host_gb_per_s": a.nbytes / _fastest(lambda: b.copy_(host, non_blocking=True), device) / 1e9,
    }


def vocabulary(size: int, device: str) -> dict[str, Any]:
    """The product of `size` rows with a head's weight, and those of both gradients, in bf16."""
    figures: dict[str, Any] = {"rows": size, "width": WIDTH}
    for classes in CLASSES:
        shapes = ((size, WIDTH), (classes, WIDTH), (size, classes))
        x, weight, out = (torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in shapes)

        def passes(x: Tensor = x, weight: Tensor = weight, out: Tensor = out) -> None:
            F.linear(x, weight)
            out @ weight
            out.T @ x

        figures[f"{classes}_ms"] = 1e3 * _fastest(passes, device)
    figures["times_as_fast"] = figures[f"{CLASSES[0]}_ms"] / figures[f"{CLASSES[-1]}_ms"]
    return figures


def indexes(size: int, device: str) -> dict[str, Any]:
    """`size` rows of WIDTH in bf16, added and copied to places in another order."""
    places = torch.randperm(size, device=device)
    rows, out = (torch.zeros(size, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2))
    add = _fastest(lambda: out.index_add_(0, places, rows), device)
    copy = _fastest(lambda: out.index_copy_(0, places, rows), device)
    return {"rows": size, "index_add_ms": 1e3 * add, "index_copy_ms": 1e3 * copy, "times_as_fast": add / copy}


def launches(size: int, device: str) -> dict[str, Any]:
    """How many kernels on `size` numbers start in a second, one after another."""
    value = torch.zeros(size, device=device)

    def many() -> None:
        for _ in range(LAUNCHES):
            value.add_(1)

    return {"numbers": size, "launches_per_s": LAUNCHES / _fastest(many, device)}


# Name -> what measures it, and its size by default.
MEASURES: dict[str, tuple[Callable[[int, str], dict[str, Any]], int]] = {
    "products": (products, 8192),
    "copies": (copies, 16384),
    "vocabulary": (vocabulary, 8192),
    "indexes": (indexes, 200_000),
    "launches": (launches, 256),
}


def _fastest(work: Callable[[], Any], device: str) -> float:
    return seconds(work, REPEATS, device)


def main(argv: list[str] | None = None) -> int:
    parser = command.make_parser("benchmarks.gpu_hour.ceilings", __doc__, "launches")
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--size", type=int, help="rows, or the side of a matrix (default: by measure)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    args = parser.parse_args(argv)
    return command.run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size={args.size} is below 1; use 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    measure, size = MEASURES[args.measure]
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    facts = about("benchmarks.gpu_hour.ceilings", argv) | machine("torch") | {"machine": name}
    write(facts | measure(args.size or size, device), args.out)


if __name__ == "__main__":
    sys.exit(main())
