"""The FLOPs of a Multiway encoder that a step really computes: those of flops.py without the products that it skips.

A step skips the gradients of frozen weights, gradients below the lowest weight that is trained, and, behind the last
block's attention, the rows that no head reads. As in flops.py, recomputation, teachers and visual tokenizers do not
count.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from pretrain.batch import Layout
from pretrain.flops import Product, executed_product
from pretrain.models.multiway.block import attention_names
from pretrain.models.multiway.shape import MultiwayShape


def executed_flops(
    cfg: MultiwayShape, layout: Layout, experts: Sequence[str], read: float, trained: frozenset[str]
) -> float:
    """The FLOPs for one micro-batch of which heads read `read` rows. An approximation: these rows are taken to be
    spread evenly over the kinds. `trained`: names of the encoder's parameters that are not frozen."""
    opened = _prefixes(trained)
    patches = Product((layout.images + layout.pairs) * layout.patches, 3 * cfg.patch_size**2, cfg.dim)
    total = executed_product(patches, weight="vision_embed.proj" in opened, inputs=False)
    flows = not opened.isdisjoint(("vision_embed", "text_embed"))  # gradients, through what comes next
    for number in range(cfg.depth):
        last = number == cfg.depth - 1
        share = min(read / max(layout.rows, 1), 1.0) if last else 1.0
        fusion = "fusion" in experts and number >= cfg.depth - cfg.fusion_layers
        block = f"blocks.{number}"
        flops, flows = _attention(cfg, layout, attention_names(cfg, experts), block, share, opened, flows)
        total += flops
        flops, flows = _experts(cfg, layout, fusion, f"{block}.experts", share, opened, flows)
        total += flops
    return total


def _attention(
    cfg: MultiwayShape,
    layout: Layout,
    names: Sequence[str],
    block: str,
    share: float,
    opened: frozenset[str],
    flows: bool,
) -> tuple[float, bool]:
    """(FLOPs, whether gradients flow through what comes next). `share`: the part of the rows that goes on behind the
    attention; `flows`: whether gradients flow through the block's input."""
    d, heads, prefix = cfg.dim, cfg.attention_dim, f"{block}.attention"
    by_name = {"shared": layout.rows, "vision": layout.vision_rows, "language": layout.language_rows}
    flows |= f"{block}.norm" in opened
    total = 0.0
    for name in names:
        for part in "qkv":
            weight = f"{prefix}.{part}.{name}.weight" in opened  # an adapter's own products are too few to count
            total += executed_product(Product(by_name[name], d, heads), weight=weight, inputs=flows)
    flows |= "relative_position" in opened or not opened.isdisjoint(f"{prefix}.{part}" for part in "qkv")
    lengths = ((layout.images, layout.image_len), (layout.pairs, layout.image_len + layout.pair_len))
    squares = sum(n * length**2 for n, length in (*lengths, (layout.texts, layout.text_len)))
    total += 2 * 2 * squares * heads * (3 if flows else 1)
    flows |= f"{prefix}.inner_norm" in opened
    for name in names:
        weight = f"{prefix}.out.{name}.weight" in opened
        total += executed_product(Product(round(by_name[name] * share), heads, d), weight=weight, inputs=flows)
    return total, flows or not opened.isdisjoint((f"{prefix}.out", f"{block}.attention_scale"))


def _experts(
    cfg: MultiwayShape,
    layout: Layout,
    fusion: bool,
    prefix: str,
    share: float,
    opened: frozenset[str],
    flows: bool,
) -> tuple[float, bool]:
    """As `_attention`, for a block's experts."""
    names: tuple[str, ...] = ("vision", "fusion", "language") if fusion else ("vision", "language")
    counts = layout.split(fusion=fusion)
    if cfg.ffn == "shared":
        names, counts = ("shared",), (layout.rows,)
    total = 0.0
    for name, rows in zip(names, counts, strict=True):
        through = flows or f"{prefix}.{name}.norm" in opened
        up, down = (f"{prefix}.{name}.{part}.weight" in opened for part in ("up", "down"))
        total += executed_product(Product(round(rows * share), cfg.dim, cfg.ffn_dim), weight=up, inputs=through)
        through = through or not opened.isdisjoint((f"{prefix}.{name}.up", f"{prefix}.{name}.inner_norm"))
        total += executed_product(Product(round(rows * share), cfg.ffn_dim, cfg.dim), weight=down, inputs=through)
    return total, flows or not opened.isdisjoint((prefix, prefix.replace(".experts", ".expert_scale")))


@cache
def _prefixes(names: frozenset[str]) -> frozenset[str]:
    """The names, and every prefix of one that ends before a dot: all modules with a parameter that is trained."""
    parts = [name.split(".") for name in names]
    return frozenset(".".join(part[:end]) for part in parts for end in range(1, len(part) + 1))
