"""One block of the Multiway encoder: attention, experts, and how drop path treats them (BEiT-3, arXiv 2208.10442, 2.1).

Shapes: T rows in the order of `batch.Layout`, D width, H heads, C width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.batch import Layout
from pretrain.layers import PLAIN, Layers, Linear
from pretrain.models.attention import NO_BIAS, NO_PADDING, Bias, Padding, attend
from pretrain.models.multiway.shape import MultiwayShape
from pretrain.rows import Rows, take


class Multiway(nn.ModuleDict):
    """One module per kind of rows, or one shared by all. Every module runs on every call, on zero rows if need be:
    ZeRO reuses or mixes the gradients of modules that are skipped."""

    def __init__(self, names: Sequence[str], make: Callable[[], nn.Module]):
        super().__init__({name: make() for name in names})

    def forward(self, x_TD: Tensor, rows: Layout | Rows) -> Tensor:
        """`rows` says how many of the T rows each kind has."""
        modules = list(self.values())
        if len(modules) == 1:
            return modules[0](x_TD)
        parts = x_TD.split(rows.split(fusion=len(modules) == 3))
        return torch.cat([module(part) for module, part in zip(modules, parts, strict=True)])


class Attention(nn.Module):
    """Multi-head self-attention, its projections shared or one set per modality."""

    def __init__(self, cfg: MultiwayShape, names: Sequence[str], layer: int, layers: Layers):
        super().__init__()
        self.head_dim, self.attend = cfg.head_width, layers.attention(attend)
        d, heads, std, cut = cfg.dim, cfg.attention_dim, _Stds.of(cfg, layer), _cut(cfg)
        self.q = Multiway(names, lambda: layers.column(d, heads, std=std.query_key, cut=cut))
        self.k = Multiway(names, lambda: layers.column(d, heads, std=std.query_key, cut=cut, bias=cfg.key_bias))
        self.v = Multiway(names, lambda: layers.column(d, heads, std=std.value, cut=cut))
        self.inner_norm = Multiway(names, lambda: layers.inner_norm(heads, eps=cfg.norm_eps)) if cfg.sub_norm else None
        self.out = Multiway(names, lambda: layers.row(heads, d, std=std.out, cut=cut))

    def forward(
        self, x_TD: Tensor, layout: Layout, padding: Padding, bias: Bias, own: Rows | None, read: Rows | None
    ) -> Tensor:
        """[T, D] -> [T, D], or only the rows `read`; the arguments are those of MultiwayBlock."""
        # -1 and not cfg.heads: under tensor parallelism this rank holds only some heads.
        q, k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in self.project(x_TD, own or layout))
        y_TD = self.attend(q, k, v, layout, padding, bias).flatten(-2)
        if read is not None:
            y_TD = take(y_TD, read.places)
        rows = read or own or layout
        return self.out(y_TD if self.inner_norm is None else self.inner_norm(y_TD, rows), rows)

    def project(self, x_TD: Tensor, rows: Layout | Rows) -> Sequence[Tensor]:
        """Queries, keys and values, [T, width of this rank's heads] each; by a single product where that is faster."""
        sets = [(self.q[name], self.k[name], self.v[name]) for name in self.q]
        if not (gains_by_fusing(x_TD) and all(map(can_fuse, sets))):
            return [projection(x_TD, rows) for projection in (self.q, self.k, self.v)]
        parts = x_TD.split(rows.split(fusion=False)) if len(sets) > 1 else [x_TD]
        fused = [_fused(part, own) for part, own in zip(parts, sets, strict=True)]
        return (fused[0] if len(fused) == 1 else torch.cat(fused)).chunk(3, -1)


def gains_by_fusing(x_TD: Tensor) -> bool:
    """Whether fewer and larger products are worth the memory of the joined weights, which is held until the backward
    pass. On a CPU they are not: benchmarks/results/calls.json."""
    return x_TD.is_cuda


def can_fuse(linears: Sequence[nn.Module]) -> bool:
    """Whether one product may replace those of `linears`: none of them is split over ranks (Megatron's layers, ZeRO-3's
    `ds_id`), and either all are trained or none is."""
    plain = all(type(one) is Linear and not hasattr(one.weight, "ds_id") for one in linears)
    return plain and len({parameter.requires_grad for one in linears for parameter in one.parameters()}) == 1


def _fused(x_TD: Tensor, linears: Sequence[Any]) -> Tensor:
    """[T, D] -> [T, sum of the linears' outputs]. The weights are joined anew in each pass, so that each stays a
    parameter with its own name."""
    biases = [one.weight.new_zeros(len(one.weight)) if one.bias is None else one.bias for one in linears]
    return nn.functional.linear(x_TD, torch.cat([one.weight for one in linears]), torch.cat(biases))


class Expert(nn.Module):
    """A feed-forward network and the norm before it."""

    def __init__(self, cfg: MultiwayShape, layer: int, layers: Layers):
        super().__init__()
        std, cut = _Stds.of(cfg, layer), _cut(cfg)
        self.norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.up = layers.column(cfg.dim, cfg.ffn_dim, std=std.up, cut=cut)
        self.inner_norm = layers.inner_norm(cfg.ffn_dim, eps=cfg.norm_eps) if cfg.sub_norm else None
        self.down = layers.row(cfg.ffn_dim, cfg.dim, std=std.down, cut=cut)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [T, D], without the residual connection."""
        y = nn.functional.gelu(self.up(self.norm(x_TD)))
        return self.down(y if self.inner_norm is None else self.inner_norm(y))


class _Stds(NamedTuple):
    """The standard deviations of the normal distributions from which a block's weights are drawn."""

    query_key: float
    value: float
    out: float
    up: float
    down: float

    @classmethod
    def of(cls, cfg: MultiwayShape, layer: int) -> _Stds:
        """Those of block `layer`, counted from 1."""
        if cfg.init == "scaled":
            small = cfg.init_std / math.sqrt(2 * layer)
            return cls(cfg.init_std, cfg.init_std, small, cfg.init_std, small)
        # Magneto, section 3.3: Xavier normal, gain sqrt(ln 2N) for all but queries and keys.
        gain = math.sqrt(math.log(2 * cfg.depth))
        square, tall = math.sqrt(1 / cfg.dim), math.sqrt(2 / (cfg.dim + cfg.ffn_dim))
        return cls(square, gain * square, gain * square, gain * tall, gain * tall)


def _cut(cfg: MultiwayShape) -> float:
    """Where these distributions are cut, as layers.draw counts it; Magneto's are not."""
    return 1.0 if cfg.init == "scaled" else math.inf


class MultiwayBlock(nn.Module):
    """Self-attention, then one feed-forward expert per kind of rows (BEiT-3, figure 2). `layer` counts from 1."""

    def __init__(self, cfg: MultiwayShape, experts: Sequence[str], layer: int, layers: Layers = PLAIN):
        super().__init__()
        names = attention_names(cfg, experts)
        self.norm = Multiway(names, lambda: nn.LayerNorm(cfg.dim, eps=cfg.norm_eps))
        self.attention = Attention(cfg, names, layer, layers)
        fusion = "fusion" in experts and layer > cfg.depth - cfg.fusion_layers
        order = [n for n in ("vision", "fusion", "language") if n in experts and (n != "fusion" or fusion)]
        order = ["shared"] if cfg.ffn == "shared" else order
        self.experts = Multiway(order, lambda: Expert(cfg, layer, layers))
        scaled = cfg.layer_scale is not None
        self.attention_scale = nn.Parameter(torch.full((cfg.dim,), cfg.layer_scale)) if scaled else None
        self.expert_scale = nn.Parameter(torch.full((cfg.dim,), cfg.layer_scale)) if scaled else None

    def forward(
        self,
        x_TD: Tensor,
        layout: Layout,
        padding: Padding = NO_PADDING,
        bias: Bias = NO_BIAS,
        own: Rows | None = None,
        read: Rows | None = None,
        factors: Tensor | None = None,
    ) -> Tensor:
        """[T, D] -> [T, D]. With `own`, x_TD holds only these rows of the pass; with `read` (for the last block), only
        these rows of x_TD come out. `factors` [T, 2]: drop path's, for attention and expert; None: nothing is dropped.
        """
        attended = self.attention(self.norm(x_TD, own or layout), layout, padding, bias, own, read)
        x = x_TD
        if read is not None:
            x, factors = take(x, read.places), None if factors is None else factors.index_select(0, read.places)
        of_attention, of_expert = (None, None) if factors is None else factors.split(1, dim=1)
        x = _add(x, attended, self.attention_scale, of_attention)
        return _add(x, self.experts(x, read or own or layout), self.expert_scale, of_expert)


def _add(x: Tensor, branch: Tensor, scale: Tensor | None, factor: Tensor | None) -> Tensor:
    """x + branch * scale * factor: LayerScale's [D], and drop path's [T, 1]."""
    branch = branch if scale is None else branch * scale
    return x + branch if factor is None else torch.addcmul(x, branch, factor)


def attention_names(cfg: MultiwayShape, experts: Sequence[str]) -> tuple[str, ...]:
    """The sets of attention weights, and of norms outside the experts, that a stage with `experts` builds."""
    if cfg.attention == "shared":
        return ("shared",)
    return tuple(name for name in ("vision", "language") if name in experts)


def drop_path_factor(rate: float, draws: Tensor) -> Tensor:
    """Stochastic depth (arXiv 1603.09382): 0 where `draws` in [0, 1) is below `rate`, and 1 / (1 - rate) elsewhere."""
    return (draws >= rate) / (1 - rate)


def sequence_of_row(layout: Layout, device: torch.device) -> Tensor:
    """int64 [T]: the number of the sequence to which each row belongs. A pair's image and text are one sequence."""
    numbers = torch.arange(layout.sequences, device=device).split([layout.images, layout.pairs, layout.texts])
    kinds = zip((numbers[0], numbers[1], *numbers[1:]), layout.shapes, strict=True)
    return torch.cat([own.unsqueeze(1).expand(-1, length).flatten() for own, (_, length) in kinds])
