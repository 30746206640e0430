"""Our training step beside others', on the same batch, in one process, in turns.

    python -m benchmarks.compare --size base --images 4 --pairs 4 --texts 4 --out benchmarks/results/compare.json

A step is forward, backward and the same fused AdamW, without a loader and without clipping: masked data modeling
over images, pairs and texts. Captions have 8 to 40 words of --pair-len, texts are full (--full-length: captions
too). Ours is BEiT-3's released architecture in one packed pass. Beside it stand:

    torchscale    its BEiT3, the released code, with the same weights, in three passes; its loss must equal ours
    transformers  Hugging Face's ViT, BERT and ViLT of the same size, one pass each (more weights, no inner norms)

Ours comes in two forms: `eager`, as simply as the others', and `compiled`, as recipes train on a GPU: blocks by
torch.compile, and in bf16 weights in bf16 with AdamW on fp32 copies of them, where the others and `eager` use autocast.
`full`: the other's heads make logits of all rows, `masked`: of the rows with a target, as ours do. Times are CPU
seconds of this process on --threads, so that other processes matter less; `times` is how many times as long the other
takes, the median over rounds in turns. `efficiency` is the share of the step that its matrix products alone would
take, at the rate of bare products of the same shapes in this process. open_clip is absent: it needs torchvision, whose
wheel does not go with the CPU build of torch.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.attention import SIZES, bare_products, products
from benchmarks.bars import write_bars
from benchmarks.compare.contestants import OTHERS, OURS, check_equal, ours, theirs
from benchmarks.record import machine
from pretrain import command
from pretrain.batch import PAD, Batch, Layout, make_batch
from pretrain.command import about, write
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.masked import MaskedData
from pretrain.tasks.pretrain import Pretrain

EXPERTS = ("vision", "language")
CODES = 8192  # of the visual tokenizer, as in every recipe
OBJECTIVE = MaskedData(image_ratio=0.4, text_ratio=0.15, pair_text_ratio=0.5, pair_image_ratio=0.4, image_codes=CODES)
WORDS = (8, 40)  # of a caption
PRECISIONS = ("fp32", "bf16")
HEADS = {False: "masked", True: "full"}


def make_one(cfg: MultiwayConfig, layout: Layout, *, full_length: bool) -> Batch:
    """A batch with hidden patches and words in the recipe's shares."""
    generator = torch.Generator().manual_seed(0)
    pictures = layout.images + layout.pairs

    def ids(count: int, length: int, *, short: bool) -> torch.Tensor:
        tokens = torch.randint(4, cfg.vocab_size, (count, length), generator=generator)
        low, high = (min(bound, length) for bound in WORDS)
        ends = (
            torch.randint(low, high + 1, (count, 1), generator=generator) if short else torch.full((count, 1), length)
        )
        return tokens.masked_fill(torch.arange(length) >= ends, PAD)

    batch = make_batch(
        layout,
        images=torch.randint(
            0, 256, (pictures, 3, cfg.image_size, cfg.image_size), generator=generator, dtype=torch.uint8
        ),
        image_masks=torch.rand(pictures, layout.patches, generator=generator) < OBJECTIVE.image_ratio,
        pair_tokens=ids(layout.pairs, layout.pair_len, short=not full_length),
        text_tokens=ids(layout.texts, layout.text_len, short=False),
    )
    shares = {"pair": OBJECTIVE.pair_text_ratio, "text": OBJECTIVE.text_ratio}
    hidden: dict[str, Any] = {"image_codes": torch.randint(CODES, batch.image_masks.shape, generator=generator)}
    for kind, share in shares.items():
        tokens = getattr(batch, f"{kind}_tokens")
        masked = (torch.rand(tokens.shape, generator=generator) < share) & (tokens != PAD)
        masked[:, 0] = True  # each text has a target
        hidden |= {f"{kind}_masked": masked, f"{kind}_inputs": tokens.masked_fill(masked, cfg.vocab_size - 1)}
    return replace(batch, **hidden).indexed()


def rate(cfg: MultiwayConfig, layout: Layout, repeats: int, *, bf16: bool) -> float:
    """FLOP/s of bare products of the shapes in a block and the patch embedding, the median."""
    one, seconds = replace(cfg, depth=1), []
    run = bare_products(one, layout, "cpu", torch.bfloat16 if bf16 else torch.float32)
    for _ in range(repeats + 1):
        begin = time.process_time()
        run()
        seconds.append(time.process_time() - begin)
    return sum(6 * a * b * c for a, b, c in products(one, layout)) / statistics.median(seconds[1:])


def executed(cfg: MultiwayConfig, batch: Batch, task: nn.Module, experts: tuple[str, ...] = EXPERTS) -> float:
    """FLOPs of the products that our step computes; how many rows the heads read is taken from the masks' ratios."""
    stage: Any = SimpleNamespace(experts=experts, objectives=(OBJECTIVE,))
    return Pretrain().executed_flops(
        cfg, stage, batch.real_layout, frozenset(name for name, _ in task.named_parameters())
    )


def compare(name: str, form: str, args: argparse.Namespace, *, bf16: bool) -> dict[str, Any]:
    """Figures of one other system beside a form of ours. Two models at a time, since three filled 15 of 24 GB,
    and there a step took 2.8 times as long."""
    cfg, layout = shape_of(args)
    batch = make_one(cfg, layout, full_length=args.full_length)
    mine = ours(cfg, OBJECTIVE, EXPERTS, form, bf16=bf16)
    other = theirs(name, cfg, mine, CODES, bf16=bf16)
    if name == "torchscale":
        check_equal(mine, other, batch)
    seconds: dict[str, list[float]] = {}
    model: Any = other.model
    for turn in range(args.rounds + 1):
        spent = {"ours": mine.step(batch)}
        for full in (False, True) if name == "torchscale" else (False,):
            model.full = full
            spent[HEADS[full]] = other.step(batch)
        if turn:  # the first one warms up
            for who, each in spent.items():
                seconds.setdefault(who, []).append(each)
    ours_s = seconds.pop("ours")
    bare = rate(cfg, replace(layout, pair_len=round(batch.real_layout.pair_len)), 5, bf16=bf16)
    figures: dict[str, Any] = {
        "ours_s": round(statistics.median(ours_s), 3),
        "bare_gflops_per_s": round(bare / 1e9),
        "efficiency": round(executed(cfg, batch, mine.model) / bare / statistics.median(ours_s), 3),
    }
    for heads, theirs_s in seconds.items():
        figures[heads] = {"s": round(statistics.median(theirs_s), 3)} | times(theirs_s, ours_s)
    return figures


def times(theirs_s: list[float], ours_s: list[float]) -> dict[str, Any]:
    """How many times as long theirs took: in the median over the turns, and in the least and the most of them."""
    ratios = [a / b for a, b in zip(theirs_s, ours_s, strict=True)]
    return {"times": round(statistics.median(ratios), 3), "from_to": [round(min(ratios), 3), round(max(ratios), 3)]}


def shape_of(args: argparse.Namespace) -> tuple[MultiwayConfig, Layout]:
    cfg = replace(SIZES[args.size], attention="per_modality", fusion_layers=0, sub_norm=True, init="sub_norm")
    cfg = replace(cfg, depth=args.depth or cfg.depth, max_text_len=max(args.pair_len, args.text_len))
    return cfg, Layout(args.images, args.pairs, args.texts, cfg.patches, args.pair_len, args.text_len)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    example = "--depth 1 --images 1 --pairs 1 --texts 1 --rounds 1"
    parser = command.make_parser("benchmarks.compare", __doc__, example)
    parser.add_argument("--size", choices=[name for name in SIZES if name != "vlmo_base"], default="base")
    parser.add_argument("--depth", type=int, help="blocks (default: the size's)")
    for kind in ("images", "pairs", "texts"):
        parser.add_argument(f"--{kind}", type=int, default=4, help="sequences of this kind (default: 4)")
    parser.add_argument("--pair-len", type=int, default=64)
    parser.add_argument("--text-len", type=int, default=196)
    parser.add_argument("--full-length", action="store_true", help="captions without padding")
    parser.add_argument("--others", nargs="+", choices=OTHERS, default=list(OTHERS))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS), help="forms of our step (default: all)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON here, and a plot beside it")
    return parser.parse_args(argv)


def _run(args: argparse.Namespace, argv: list[str] | None) -> None:
    for name in ("images", "pairs", "texts", "pair_len", "text_len", "rounds", "threads"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}={getattr(args, name)} is below 1; use 1 or more")
    torch.set_num_threads(args.threads)
    facts: dict[str, Any] = about("benchmarks.compare", argv) | machine("torch", "torchscale", "transformers")
    results: dict[str, Any] = {}
    for precision in args.precisions:
        for other in args.others:
            for form in args.ours:
                results[f"{other} {precision}, ours {form}"] = compare(other, form, args, bf16=precision == "bf16")
                gc.collect()  # gigabytes
                write(facts | {"results": results}, args.out, show=False)
    write(facts | {"results": results}, args.out)
    if args.out is not None:
        bars = {
            f"{name}, {heads} heads": cell[heads]["times"]
            for name, cell in results.items()
            for heads in ("full", "masked")
            if heads in cell
        }
        title = "How many times as long a step takes as ours"
        write_bars(args.out.with_suffix(".svg"), title, bars, mark=1.0, note=facts["command"])


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    return command.run(lambda: _run(args, argv), state="what was measured so far is in --out")


if __name__ == "__main__":
    sys.exit(main())
