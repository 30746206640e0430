"""Model FLOPs, as MFU counts them, the FLOPs that are really executed, and the peak rates of GPUs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from pretrain.batch import Layout

# Dense tensor-core peak in FLOP/s, bf16 with fp32 accumulation (V100 and T4: fp16, since they have no bf16). The first
# entry whose words are all in the device's name counts. Source: NVIDIA's data sheet of each.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A40": 150e12,
    "RTX A6000": 155e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


class Product(NamedTuple):
    """A matrix product: [rows, inputs] times [inputs, outputs]."""

    rows: int
    inputs: int
    outputs: int
    classes: bool = False  # a softmax over the outputs follows, as in a cross-entropy


class StepFlops(NamedTuple):
    """FLOPs of one step on one rank, forward and backward."""

    padded: float = 0.0  # of all rows of its layouts, padding included
    real: float = 0.0  # of the rows that are not padding
    executed: float = 0.0  # the part of `real` that is really computed; see Model.executed_flops


def product_flops(products: Iterable[Product]) -> int:
    """FLOPs of these products, forward and backward (3 x forward; a multiply-add counts as two)."""
    return sum(3 * 2 * each.rows * each.inputs * each.outputs for each in products)


def executed_product(product: Product, *, weight: bool, inputs: bool) -> float:
    """FLOPs of a product's forward pass, and of the gradients that are computed: the `weight`'s, and the `inputs`'."""
    return 2 * product.rows * product.inputs * product.outputs * (1 + weight + inputs)


def flops_per_sequence(length: int, *, dim: int, depth: int, ffn_dim: int, attention_dim: int | None = None) -> int:
    """FLOPs of one sequence of `length` rows through a transformer, forward and backward (3 x forward: the backward
    pass has two products for each one). A multiply-add counts as two. Norms, biases and softmax are left out, causal
    attention counts as full, and activation recomputation gets no credit: the "model FLOPs" of MFU (PaLM, arXiv
    2204.02311, appendix B). `attention_dim`: width of all heads together, None: dim."""
    heads = dim if attention_dim is None else attention_dim
    projections = 2 * length * (4 * dim * heads + 2 * dim * ffn_dim)
    attention = 2 * 2 * length * length * heads  # scores, and the sum of the values
    return 3 * depth * (projections + attention)


def encoder_flops(
    layout: Layout, *, dim: int, depth: int, ffn_dim: int, patch_inputs: int = 0, attention_dim: int | None = None
) -> int:
    """FLOPs of one micro-batch, forward and backward, as flops_per_sequence counts them. `patch_inputs`: numbers in a
    patch, 3 * patch_size**2. Rows of frozen modules count like any others, and so do the rows that the last block
    leaves out because no head reads them."""
    sequences = (
        (layout.images, layout.image_len),
        (layout.pairs, layout.image_len + layout.pair_len),
        (layout.texts, layout.text_len),
    )
    sizes: Any = {"dim": dim, "depth": depth, "ffn_dim": ffn_dim, "attention_dim": attention_dim}
    blocks = sum(n * flops_per_sequence(length, **sizes) for n, length in sequences)
    patches = (layout.images + layout.pairs) * layout.patches
    return blocks + product_flops([Product(patches, patch_inputs, dim)])


def peak_flops(device: torch.device | str) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None for a CPU and for a GPU that is not in PEAKS."""
    device = torch.device(device)
    return _peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _peak_of(name: str) -> float | None:
    for known, peak in PEAKS.items():
        if all(re.search(rf"\b{word}\b", name) for word in known.split()):
            return peak
    return None
