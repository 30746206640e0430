"""The encoder's speed compared with the sum of its matrix products, on the available device.

    python -m benchmarks.attention --size quickstart --images 64 --pairs 64 --texts 64
    python -m benchmarks.attention --size base --images 32 --pairs 32 --texts 32 --dtype bf16

Times forward and backward of one packed pass, of the same rows in three separate passes, and of the bare products of
the same shapes. Prints JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.record import machine
from pretrain.batch import Batch, Layout, make_batch
from pretrain.command import about, make_parser, run, write
from pretrain.models.multiway import sizes
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.encoder import MultiwayEncoder

QUICKSTART = MultiwayConfig(
    dim=192,
    depth=4,
    heads=3,
    ffn_dim=768,
    image_size=64,
    patch_size=8,
    vocab_size=2000,
    max_text_len=64,
    fusion_layers=1,
)
SIZES = {
    "quickstart": QUICKSTART,
    "base": sizes.BEIT3_BASE,
    "base_released": sizes.BEIT3_BASE_RELEASED,
    "large": sizes.BEIT3_LARGE,
    "giant": sizes.BEIT3_GIANT,
    "vlmo_base": sizes.VLMO_BASE,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = ("images", "pairs", "texts")


def random_batch(cfg: MultiwayConfig, layout: Layout, device: str, *, padded: bool) -> Batch:
    count = layout.images + layout.pairs

    def ids(rows: int, length: int) -> torch.Tensor:
        tokens = torch.randint(4, cfg.vocab_size, (rows, length))
        ends = torch.randint(length // 2, length + 1, (rows, 1)) if padded else torch.full((rows, 1), length)
        return tokens.masked_fill(torch.arange(length) >= ends, 1)

    images = torch.randint(0, 256, (count, 3, cfg.image_size, cfg.image_size), dtype=torch.uint8)
    masks = torch.rand(count, cfg.grid**2) < 0.4
    pairs, texts = ids(layout.pairs, layout.pair_len), ids(layout.texts, layout.text_len)
    if not count:
        return make_batch(layout, pair_tokens=pairs, text_tokens=texts).indexed().to(device)
    batch = make_batch(layout, images=images, image_masks=masks, pair_tokens=pairs, text_tokens=texts)
    return batch.indexed().to(device)


def products(cfg: MultiwayConfig, layout: Layout) -> Iterator[tuple[int, int, int]]:
    """(rows, inputs, outputs) of every projection in the blocks and the patch embedding."""
    yield layout.vision_rows, 3 * cfg.patch_size**2, cfg.dim
    shared = cfg.attention == "shared"
    for layer in range(1, cfg.depth + 1):
        for rows in (layout.rows,) if shared else layout.split(fusion=False):
            yield from [(rows, cfg.dim, cfg.dim)] * 4
        for rows in layout.split(fusion=layer > cfg.depth - cfg.fusion_layers):
            yield rows, cfg.dim, cfg.ffn_dim
            yield rows, cfg.ffn_dim, cfg.dim


def attention_products(layout: Layout) -> Iterator[tuple[int, int]]:
    """(sequences, length) of every kind."""
    yield layout.images, layout.image_len
    yield layout.pairs, layout.image_len + layout.pair_len
    yield layout.texts, layout.text_len


def flops(cfg: MultiwayConfig, layout: Layout) -> int:
    """Forward and backward (twice the forward) of all matrix products, attention's included."""
    linear = sum(2 * rows * inputs * outputs for rows, inputs, outputs in products(cfg, layout))
    scores = sum(4 * n * length**2 * cfg.dim for n, length in attention_products(layout)) * cfg.depth
    return 3 * (linear + scores)


def bare_products(cfg: MultiwayConfig, layout: Layout, device: str, dtype: torch.dtype) -> Callable[[], None]:
    """Only the projections: for each shape x w, then both gradients' products. Without attention's own products."""
    work = []
    for rows, inputs, outputs in products(cfg, layout):
        if rows:
            shapes = ((rows, inputs), (outputs, inputs), (rows, outputs))
            work.append([torch.randn(shape, device=device, dtype=dtype) for shape in shapes])

    def run() -> None:
        for x, w, y in work:
            F.linear(x, w)
            y @ w
            y.T @ x

    return run


def seconds(run: Callable[[], None], repeats: int, device: str) -> float:
    """The fastest of `repeats` runs, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser("benchmarks.attention", __doc__, "--images 8 --pairs 8 --texts 8 --repeats 1")
    parser.add_argument("--size", choices=SIZES, default="quickstart")
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=32, help="sequences of this kind (default: 32)")
    parser.add_argument("--pair-len", type=int, default=32)
    parser.add_argument("--text-len", type=int, default=64)
    parser.add_argument("--no-padding", action="store_true", help="texts of full length (default: half of them padded)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> dict:
    cfg, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
    cfg = replace(cfg, max_text_len=max(cfg.max_text_len, args.pair_len, args.text_len))
    dtype = DTYPES[args.dtype]
    model = MultiwayEncoder(cfg).to(device, dtype)
    whole = Layout(args.images, args.pairs, args.texts, cfg.patches, args.pair_len, args.text_len)
    zero = dict.fromkeys(KINDS, 0)
    separate_layouts = [replace(whole, **(zero | {kind: n})) for kind in KINDS if (n := getattr(whole, kind))]
    batches = [random_batch(cfg, layout, device, padded=not args.no_padding) for layout in (whole, *separate_layouts)]

    def step(batches: list[Batch]) -> None:
        for batch in batches:
            model(batch).pack().float().square().mean().backward()
        model.zero_grad()

    packed = seconds(lambda: step(batches[:1]), args.repeats, device)
    separate = seconds(lambda: step(batches[1:]), args.repeats, device)
    bare = seconds(bare_products(cfg, whole, device, dtype), args.repeats, device)
    return {
        "size": args.size,
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu x {torch.get_num_threads()}",
        "dtype": args.dtype,
        "rows": whole.rows,
        "packed_s": round(packed, 4),
        "separate_s": round(separate, 4),
        "projections_alone_s": round(bare, 4),
        "projections_share": round(bare / packed, 3),
        "tflops": round(flops(cfg, whole) / packed / 1e12, 3),
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return run(lambda: _run(args, argv), state="nothing was written")


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    facts = about("benchmarks.attention", argv) | machine("torch")
    write({**facts, **measure(args)}, args.out)


if __name__ == "__main__":
    sys.exit(main())
