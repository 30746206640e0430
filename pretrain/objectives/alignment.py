"""How well a text's words match a picture's patches: the cost of the optimal transport that moves each word to the
patches most similar to it (UNITER's word-region alignment, arXiv 1909.11740, 3.2; ViLT's word-patch alignment, arXiv
2102.03334, 3.3).

Shapes: N pairs, L words, M patches, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# IPOT's step size and number of steps, as in ChenRocks/UNITER model/ot.py, optimal_transport_dist, and in ViLT.
BETA, ITERATIONS = 0.5, 50


def distance(words: Tensor, patches: Tensor, real: Tensor) -> Tensor:
    """[N, L, D], [N, M, D] -> fp32 [N]: the cost of the transport of each text to its picture, where moving a word to a
    patch costs 1 - cosine. `real` bool [N, L]: the words that count; the cost is 0 where none does. No gradient goes
    through the plan."""
    cost = 1 - F.normalize(words.float(), dim=-1) @ F.normalize(patches.float(), dim=-1).mT
    return (cost * transport(cost.detach(), real)).sum((1, 2))


@torch.no_grad()
def transport(cost: Tensor, real: Tensor) -> Tensor:
    """The costs fp32 [N, L, M] and `real` bool [N, L] -> the plan [N, L, M], by IPOT's proximal steps (arXiv
    1802.04307, algorithm 1). The words that count share a mass of 1 equally, and so do the patches."""
    own, count = real.float().unsqueeze(-1), cost.shape[-1]
    share = own / own.sum(1, keepdim=True).clamp(min=1)  # [N, L, 1]: the mass of each word
    kernel = (-cost / BETA).exp() * own
    plan, left = torch.ones_like(cost) * own, share
    for _ in range(ITERATIONS):
        pull = kernel * plan
        # Each row of the plan adds up to its word's mass, and each column to a patch's. In a text without words the
        # denominators are 0, and so are the numerators.
        right = 1 / (count * (pull.mT @ left)).clamp(min=torch.finfo(cost.dtype).tiny)
        left = share / (pull @ right).clamp(min=torch.finfo(cost.dtype).tiny)
        plan = left * pull * right.mT
    return plan
