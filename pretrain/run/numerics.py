"""How a GPU computes: with or without TF32, by the fastest kernels or by those that give the same bits every time."""

from __future__ import annotations

import os

import torch

from pretrain.config import Recipe


def set_numerics(recipe: Recipe) -> None:
    """For this process; before its first product on a GPU, where cuBLAS reads its setting. On a CPU one program gives
    the same bits every time, whatever is set.

    `deterministic` chooses, among torch's kernels, those without atomics: the backward passes of flash and
    memory-efficient attention, of embeddings and of indexes. NCCL's sums are the same each time on the same ranks; on
    others, as under other ZeRO stages, they are equal to rounding. What has no such kernel raises torch's error.
    """
    torch.set_float32_matmul_precision("high" if recipe.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = recipe.tf32  # torch's own default is true, for convolutions alone
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # it finds bugs, and writes everything twice
    torch.use_deterministic_algorithms(recipe.deterministic)
