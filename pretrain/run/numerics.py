"""How a GPU computes: with or without TF32, by the fastest kernels or by those that give the same bits every time."""

from __future__ import annotations

import os

import torch

from pretrain.config import Recipe


def set_numerics(recipe: Recipe) -> None:
    """Sets this process's numerics. Must be called before its first matrix product on a GPU, when cuBLAS reads its
    setting. On a CPU one program gives the same bits every time, whatever is set.

    `deterministic` chooses torch's kernels without atomics for the backward passes of flash and memory-efficient
    attention, of embeddings and of indexing. NCCL's sums have the same bits each time on the same ranks; on other
    numbers of ranks, or under other ZeRO stages, they are equal to rounding. An operator without a deterministic kernel
    raises torch's error.
    """
    torch.set_float32_matmul_precision("high" if recipe.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = recipe.tf32  # torch's own default is true, for convolutions alone
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.utils.deterministic.fill_uninitialized_memory = False  # for debugging only: it writes all memory twice
    torch.use_deterministic_algorithms(recipe.deterministic)
