"""Words beside the patches that they speak of: how far a text and a picture lie apart when each word is moved to the
patches that are the most like it, as optimal transport (UNITER's word-region alignment, arXiv 1909.11740, 3.2; ViLT's
word-patch alignment, arXiv 2102.03334, 3.3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# [ChenRocks/UNITER model/ot.py, optimal_transport_dist; dandelin/ViLT has the same]
BETA, ITERATIONS = 0.5, 50


def distance(words: Tensor, patches: Tensor, real: Tensor) -> Tensor:
    """[N, L, D], [N, M, D], bool [N, L]: the words that count -> fp32 [N]: what the transport of each text to its
    picture costs, by 1 less the cosines; 0 where no word counts. No gradient goes through the plan."""
    cost = 1 - F.normalize(words.float(), dim=-1) @ F.normalize(patches.float(), dim=-1).mT
    return (cost * transport(cost.detach(), real)).sum((1, 2))


@torch.no_grad()
def transport(cost: Tensor, real: Tensor) -> Tensor:
    """fp32 [N, L, M], bool [N, L] -> the plan [N, L, M], by IPOT's proximal steps (arXiv 1802.04307, algorithm 1): all
    words that count carry the same weight, and all patches take the same; a word that does not count carries none."""
    own, count = real.float().unsqueeze(-1), cost.shape[-1]
    share = own / own.sum(1, keepdim=True).clamp(min=1)  # [N, L, 1]: of each word
    kernel = (-cost / BETA).exp() * own
    plan, left = torch.ones_like(cost) * own, share
    for _ in range(ITERATIONS):
        pull = kernel * plan
        # Each row of the plan adds up to its word's share, and each column to a patch's. Where a text has no words both
        # sums are 0, and so is what stands over them.
        right = 1 / (count * (pull.mT @ left)).clamp(min=torch.finfo(cost.dtype).tiny)
        left = share / (pull @ right).clamp(min=torch.finfo(cost.dtype).tiny)
        plan = left * pull * right.mT
    return plan
