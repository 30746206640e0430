"""The codebook of the visual tokenizer: unit vectors that follow the vectors they stand for, without a gradient.

Source: BEiT v2, arXiv 2208.06366, section 2.1, and its reference code where the paper is silent (k-means start,
l2-normalised moving average, codes without vectors stay). Ours sums exactly and can restart dead codes.

n vectors, K codes, C width of a code.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.distributed import gather_rows

# Optimizer steps over which `Codebook.use` counts codes.
USE_WINDOW = 100
KMEANS_ROUNDS = 10
# Sums of unit vectors are counted in units of 2^-32. The order of integer additions does not matter, so neither the
# number of ranks and micro-batches nor atomic adds on a GPU change a bit of them; 2^31 vectors fit.
FIXED_POINT = 2.0**32
# Similarities that are held at once: 256 MiB on a GPU; on a CPU what its caches hold.
SIMILARITIES_CUDA, SIMILARITIES_CPU = 2**26, 2**20
NEVER = -(2**40)  # the step in which a code was last used, if it never was


def nearest(vectors: Tensor, codebook_KC: Tensor) -> tuple[Tensor, Tensor]:
    """For unit vectors [n, C]: the nearest code int64 [n] and the cosine similarity to it [n]. Between unit vectors
    the smallest distance is the greatest similarity."""
    room = SIMILARITIES_CUDA if vectors.is_cuda else SIMILARITIES_CPU
    with torch.autocast(vectors.device.type, enabled=False):
        parts = [(part @ codebook_KC.T).max(dim=-1) for part in vectors.split(max(1, room // len(codebook_KC)))]
    if not parts:
        return vectors.new_zeros(0, dtype=torch.long), vectors.new_zeros(0)
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


def add_to_tally(tally: Tensor, vectors: Tensor, codes: Tensor) -> None:
    """Adds to int64 [K, C + 1], per code, the sum of its vectors in FIXED_POINT units and (last column) their count.
    Vectors that are not finite, of a step that is skipped, are left out."""
    finite = vectors.isfinite().all(-1, keepdim=True)
    fixed = (torch.where(finite, vectors, 0).double() * FIXED_POINT).round().long()
    tally.index_add_(0, codes, torch.cat([fixed, finite.long()], 1))


def mean_directions(tally: Tensor) -> Tensor:
    """The unit vectors [K, C] along a tally's sums; zeros for a code without vectors."""
    return F.normalize(tally[:, :-1].double(), dim=-1).float()


def draw_far_vectors(similarity: Tensor, count: int, seed: int) -> Tensor:
    """The numbers of `count` vectors, drawn without replacement in proportion to their distance from their codes: the
    draw of k-means++ (Arthur and Vassilvitskii 2007), all at once by Gumbel noise. `similarity` [n] to each vector's
    code. Deterministic, and the same on CPU and GPU."""
    noise = torch.rand(len(similarity), generator=torch.Generator().manual_seed(seed), device="cpu").to(similarity)
    gumbel = -(-noise.clamp(1e-20, 1 - 1e-7).log()).log()
    distance = (1 - similarity).clamp_min(1e-12)
    return (distance.log() + gumbel).topk(min(count, len(similarity))).indices


def spherical_kmeans(vectors: Tensor, codes: int, *, refill: bool, seed: int = 0) -> tuple[Tensor, Tensor]:
    """k-means by cosine, starting from a random choice of the unit vectors [n, C] -> means [codes, C] and how many
    vectors each had in the last round [codes]. A mean without vectors stays where it is (BEiT v2), or with `refill`
    moves to a far vector."""
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed), device="cpu")
    means = vectors[order.repeat(math.ceil(codes / len(vectors)))[:codes].to(vectors.device)]
    counts = vectors.new_zeros(codes, dtype=torch.long)
    for round_ in range(KMEANS_ROUNDS):
        chosen, similarity = nearest(vectors, means)
        tally = vectors.new_zeros(codes, vectors.shape[1] + 1, dtype=torch.long)
        add_to_tally(tally, vectors, chosen)
        counts = tally[:, -1]
        means = torch.where(counts[:, None] > 0, mean_directions(tally), means)
        empty = (counts == 0).nonzero().flatten()
        if refill and len(empty):
            far = draw_far_vectors(similarity, len(empty), seed + round_ + 1)
            means[empty[: len(far)]] = vectors[far]
    return means, counts


class Codebook(nn.Module):
    """K unit vectors that follow, by a moving average, the mean direction of the vectors they stand for. No gradient
    reaches them. Its buffers keep their types when DeepSpeed casts the model to bf16, and its arithmetic is fp32.

    `decay`: of the moving average, per optimizer step. `restart_after`: steps without use after which a code moves to a
    far vector; None: never."""

    vectors: Tensor
    steps: Tensor
    last_used: Tensor
    restarted: Tensor
    started: Tensor
    tally: Tensor

    def __init__(self, codes: int, code_dim: int, *, decay: float, restart_after: int | None):
        super().__init__()
        self.codes, self.decay, self.restart_after = codes, decay, restart_after
        # A generator of its own: every rank begins with the same codes. `.float()` and the copy: zero.Init casts what
        # torch's constructors make, and a tensor made on the CPU would stay there.
        start = torch.randn(codes, code_dim, generator=torch.Generator().manual_seed(0), device="cpu")
        vectors = torch.empty(codes, code_dim).float()
        self.register_buffer("vectors", vectors.copy_(F.normalize(start.float(), dim=-1)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("last_used", torch.full((codes,), NEVER, dtype=torch.long))
        self.register_buffer("restarted", torch.zeros(codes, dtype=torch.long))
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        # Belongs to the optimizer step that is under way, so that no checkpoint needs it.
        self.register_buffer("tally", torch.zeros(codes, code_dim + 1, dtype=torch.long), persistent=False)
        self.seen: list[Tensor] = []

    def _apply(self, fn, recurse: bool = True):
        originals = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in originals.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors fp32 [..., C] -> their codes' vectors [..., C] (no gradient) and the codes int64 [...]. In
        training the vectors are also tallied for `after_step`."""
        flat = z.detach().reshape(-1, z.shape[-1])
        codes, _ = nearest(flat, self.vectors)
        if self.training and torch.is_grad_enabled():
            add_to_tally(self.tally, flat, codes)
            if self.restart_after is not None:
                self.seen.append(flat)
        codes = codes.reshape(z.shape[:-1])
        return F.embedding(codes, self.vectors), codes

    @property
    def use(self) -> Tensor:
        """The fraction of the codes that were used within the last USE_WINDOW optimizer steps."""
        return (self.steps - self.last_used < USE_WINDOW).float().mean()

    @torch.no_grad()
    def start(self, vectors: Tensor, group: dist.ProcessGroup | None = None) -> None:
        """k-means over all ranks' vectors [n, C], n equal on every rank, taken in rank order."""
        means, counts = spherical_kmeans(gather_rows(vectors, group), self.codes, refill=self.restart_after is not None)
        self.vectors.copy_(means)
        self.last_used.copy_(torch.where(counts > 0, self.steps, NEVER))
        self.restarted.copy_(self.steps.expand_as(self.restarted))
        self.started.fill_(True)

    @torch.no_grad()
    def after_step(self, group: dist.ProcessGroup | None = None) -> None:
        """Moves each used code towards the mean direction of all ranks' vectors of this optimizer step."""
        if dist.is_initialized():
            dist.all_reduce(self.tally, group=group)
        used = self.tally[:, -1] > 0
        self.steps += 1
        moved = F.normalize(torch.lerp(self.vectors, mean_directions(self.tally), 1 - self.decay), dim=-1)
        self.vectors.copy_(torch.where(used[:, None], moved, self.vectors))
        self.last_used.copy_(torch.where(used, self.steps, self.last_used))
        if self.restart_after is not None and self.seen:
            self._restart_dead(self.restart_after, group)
        self.tally.zero_()
        self.seen.clear()

    def _restart_dead(self, after: int, group: dist.ProcessGroup | None) -> None:
        idle = self.steps - torch.maximum(self.last_used, self.restarted)
        dead = (idle >= after).nonzero().flatten()
        if not len(dead):  # equal on every rank: the tally was all-reduced
            return
        seen = gather_rows(torch.cat(self.seen), group)
        seen = seen[seen.isfinite().all(-1)]  # the same on every rank
        far = draw_far_vectors(nearest(seen, self.vectors)[1], len(dead), seed=int(self.steps))
        dead = dead[: len(far)]
        self.vectors[dead] = seen[far]
        self.restarted[dead] = self.steps
        self.last_used[dead] = NEVER
