"""The Multiway encoder: one packed pass over images, pairs and texts (BEiT-3, arXiv 2208.10442; VLMo, 2111.02358).

Shapes: T rows in the order of `batch.Layout`, D width, H heads, C width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.batch import Batch, Layout
from pretrain.layers import PLAIN, Layers
from pretrain.models.attention import NO_BIAS, NO_PADDING, Bias, Padding, attend, can_pack, padding_of
from pretrain.models.embeddings import RelativePosition, TextEmbedding, VisionEmbedding

EXPERTS = ("vision", "language", "fusion")


@dataclass(frozen=True)
class MultiwayConfig:
    """The shape of a Multiway encoder. See models/sizes.py for the published ones."""

    dim: int
    depth: int
    heads: int
    ffn_dim: int
    image_size: int
    patch_size: int
    vocab_size: int
    image_codes: int = 8192
    max_text_len: int = 196
    # shared: one attention and one attention norm for all rows, experts own their norm (the paper, VLMo).
    # per_modality: projections and every norm apart for vision and language rows (the released BEiT-3).
    attention: Literal["shared", "per_modality"] = "shared"
    fusion_layers: int = 0  # the top blocks in which pairs have an expert of their own
    sub_norm: bool = False  # a second norm before the output projections (Magneto, arXiv 2210.06423)
    layer_scale: float | None = None  # initial value of a learned factor on each branch's outputs
    relative_position: bool = False  # VLMo's bias on the attention scores, instead of learned positions
    text_norm: bool = False  # a norm behind the text embedding (BERT, VLMo)
    key_bias: bool = True
    norm_eps: float = 1e-5
    # scaled: std init_std, layer l's output matrices / sqrt(2 l) (BEiT-3, footnote 4). sub_norm: Magneto's.
    init: Literal["scaled", "sub_norm"] = "scaled"
    init_std: float = 0.02
    drop_path: float = 0.0  # of the last block; it rises linearly from 0
    activation_checkpointing: int = 0  # 0: off; n: what is kept for the backward pass is every n-th block's input

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "depth",
            "heads",
            "ffn_dim",
            "image_size",
            "patch_size",
            "vocab_size",
            "image_codes",
            "max_text_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} is wrong because it must be at least 1")
        if self.dim % self.heads:
            above = (self.dim // self.heads + 1) * self.heads
            raise ValueError(f"model.dim={self.dim} is not a multiple of model.heads={self.heads}; use {above}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}; "
                f"use {max(self.image_size // self.patch_size, 1) * self.patch_size}"
            )
        if not 0 <= self.fusion_layers <= self.depth:
            raise ValueError(
                f"model.fusion_layers={self.fusion_layers} is wrong because the model has {self.depth} blocks; "
                f"use 0 to {self.depth}"
            )
        if not self.init_std > 0:
            raise ValueError(f"model.init_std={self.init_std} must be above 0; the papers use 0.02")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.drop_path={self.drop_path} is not a rate; use at least 0 and less than 1")
        if self.activation_checkpointing < 0:
            raise ValueError(
                f"model.activation_checkpointing={self.activation_checkpointing} is wrong; use 0 (off), 1 (every "
                "block) or a number of blocks"
            )
        for name, choices in (("attention", ("shared", "per_modality")), ("init", ("scaled", "sub_norm"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name}={getattr(self, name)!r} is unknown; use {' or '.join(choices)}")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Rows of one image: the class row and the patches."""
        return self.grid**2 + 1


class ReadRows(NamedTuple):
    """The rows of a packed pass that a head reads; the last block's other rows are not worth computing."""

    places: Tensor  # int64 [R], rising
    counts: tuple[int, ...]  # of them: image-only, pair image, pair text, text-only

    @classmethod
    def of(cls, needed_T: Tensor, layout: Layout) -> ReadRows:
        kinds = needed_T.split([layout.image_rows, layout.pair_image_rows, layout.pair_text_rows, layout.text_rows])
        counts = torch.stack([kind.sum() for kind in kinds]).tolist()
        return cls(needed_T.nonzero().squeeze(1), tuple(counts))

    def split(self, *, fusion: bool) -> tuple[int, ...]:
        """As `Layout.split`."""
        images, pair_images, pair_texts, texts = self.counts
        return (images, pair_images + pair_texts, texts) if fusion else (images + pair_images, pair_texts + texts)


class Multiway(nn.ModuleDict):
    """One module per kind of rows, or one shared by all. Every module runs on every call, on zero rows if need be:
    ZeRO reuses or mixes the gradients of modules that are skipped."""

    def __init__(self, names: Sequence[str], make: Callable[[], nn.Module]):
        super().__init__({name: make() for name in names})

    def forward(self, x_TD: Tensor, layout: Layout | ReadRows) -> Tensor:
        modules = list(self.values())
        if len(modules) == 1:
            return modules[0](x_TD)
        rows = x_TD.split(layout.split(fusion=len(modules) == 3))
        return torch.cat([module(part) for module, part in zip(modules, rows, strict=True)])


class Attention(nn.Module):
    """Multi-head self-attention, its projections shared or one set per modality."""

    def __init__(self, cfg: MultiwayConfig, names: Sequence[str], layer: int, layers: Layers):
        super().__init__()
        self.head_dim = cfg.dim // cfg.heads
        d, std = cfg.dim, _Stds.of(cfg, layer)
        self.q = Multiway(names, lambda: layers.column(d, d, std=std.query_key))
        self.k = Multiway(names, lambda: layers.column(d, d, std=std.query_key, bias=cfg.key_bias))
        self.v = Multiway(names, lambda: layers.column(d, d, std=std.value))
        self.inner_norm = Multiway(names, lambda: layers.inner_norm(d, eps=cfg.norm_eps)) if cfg.sub_norm else None
        self.out = Multiway(names, lambda: layers.row(d, d, std=std.out))

    def forward(self, x_TD: Tensor, layout: Layout, padding: Padding, bias: Bias, read: ReadRows | None) -> Tensor:
        # -1 and not cfg.heads: under tensor parallelism this rank holds only some heads.
        q, k, v = (p(x_TD, layout).unflatten(-1, (-1, self.head_dim)) for p in (self.q, self.k, self.v))
        y_TD = attend(q, k, v, layout, padding, bias).flatten(-2)
        if read is not None:
            y_TD = y_TD.index_select(0, read.places)
        if self.inner_norm is not None:
            y_TD = self.inner_norm(y_TD, read or layout)
        return self.out(y_TD, read or layout)


class Expert(nn.Module):
    """A feed-forward network and the norm before it."""

    def __init__(self, cfg: MultiwayConfig, layer: int, layers: Layers):
        super().__init__()
        std = _Stds.of(cfg, layer)
        self.norm = nn.LayerNorm(cfg.dim, eps=cfg.norm_eps)
        self.up = layers.column(cfg.dim, cfg.ffn_dim, std=std.up)
        self.inner_norm = layers.inner_norm(cfg.ffn_dim, eps=cfg.norm_eps) if cfg.sub_norm else None
        self.down = layers.row(cfg.ffn_dim, cfg.dim, std=std.down)

    def forward(self, x_TD: Tensor) -> Tensor:
        y = nn.functional.gelu(self.up(self.norm(x_TD)))
        return self.down(y if self.inner_norm is None else self.inner_norm(y))


class _Stds(NamedTuple):
    query_key: float
    value: float
    out: float
    up: float
    down: float

    @classmethod
    def of(cls, cfg: MultiwayConfig, layer: int) -> _Stds:
        """Standard deviations of the weights of block `layer`, counted from 1."""
        if cfg.init == "scaled":
            small = cfg.init_std / math.sqrt(2 * layer)
            return cls(cfg.init_std, cfg.init_std, small, cfg.init_std, small)
        # Magneto, section 3.3: Xavier normal, gain sqrt(ln 2N) for all but queries and keys.
        gain = math.sqrt(math.log(2 * cfg.depth))
        square, tall = math.sqrt(1 / cfg.dim), math.sqrt(2 / (cfg.dim + cfg.ffn_dim))
        return cls(square, gain * square, gain * square, gain * tall, gain * tall)


class MultiwayBlock(nn.Module):
    """Self-attention, then one feed-forward expert per kind of rows (BEiT-3, figure 2)."""

    def __init__(self, cfg: MultiwayConfig, experts: Sequence[str], layer: int, layers: Layers = PLAIN):
        super().__init__()
        names = attention_names(cfg, experts)
        self.drop_path = cfg.drop_path * (layer - 1) / max(cfg.depth - 1, 1)
        self.norm = Multiway(names, lambda: nn.LayerNorm(cfg.dim, eps=cfg.norm_eps))
        self.attention = Attention(cfg, names, layer, layers)
        fusion = "fusion" in experts and layer > cfg.depth - cfg.fusion_layers
        order = [n for n in ("vision", "fusion", "language") if n in experts and (n != "fusion" or fusion)]
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
        read: ReadRows | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """-> [T, D]; with `read` (for the last block) only its rows, [R, D]. `noise` in [0, 1), [sequences, 2], throws
        the dice of drop path for attention and expert; without it nothing is dropped."""
        dice = (None, None) if noise is None else noise.unbind(1)
        seen = self.attention(self.norm(x_TD, layout), layout, padding, bias, read)
        x = x_TD if read is None else x_TD.index_select(0, read.places)
        x = self._add(x, seen, self.attention_scale, layout, read, dice[0])
        return self._add(x, self.experts(x, read or layout), self.expert_scale, layout, read, dice[1])

    def _add(
        self,
        x: Tensor,
        branch: Tensor,
        scale: Tensor | None,
        layout: Layout,
        read: ReadRows | None,
        dice: Tensor | None,
    ) -> Tensor:
        if scale is not None:
            branch = branch * scale
        if self.drop_path == 0 or dice is None:
            return x + branch
        keep = keep_rows(layout, self.drop_path, dice).to(x.dtype)
        return torch.addcmul(x, branch, keep if read is None else keep.index_select(0, read.places))


def attention_names(cfg: MultiwayConfig, experts: Sequence[str]) -> tuple[str, ...]:
    """The sets of attention weights, and of norms outside the experts, that a stage with `experts` builds."""
    if cfg.attention == "shared":
        return ("shared",)
    return tuple(name for name in ("vision", "language") if name in experts)


def keep_rows(layout: Layout, rate: float, dice: Tensor) -> Tensor:
    """Stochastic depth: a factor [T, 1] that is 0 for all rows of a sequence whose `dice` [sequences] in [0, 1) fell
    below `rate`, and 1 / (1 - rate) elsewhere."""
    keep = (dice >= rate).unsqueeze(1) / (1 - rate)
    images, pairs, texts = keep.split([layout.images, layout.pairs, layout.texts])
    rows = ((images, layout.patches), (pairs, layout.patches), (pairs, layout.pair_len), (texts, layout.text_len))
    return torch.cat([part.expand(-1, length).reshape(-1, 1) for part, length in rows])


class MultiwayEncoder(nn.Module):
    """Embeddings, blocks and the final norm. Builds only what a stage with `experts` needs; a batch with rows for which
    nothing was built is a ValueError."""

    def __init__(self, cfg: MultiwayConfig, experts: Sequence[str] = EXPERTS, layers: Layers = PLAIN):
        super().__init__()
        check_experts(experts)
        self.cfg, self.expert_names = cfg, tuple(experts)
        self.vision_embed = VisionEmbedding(cfg) if "vision" in experts else None
        self.text_embed = TextEmbedding(cfg, layers) if "language" in experts else None
        self.relative_position = RelativePosition(cfg, layers) if cfg.relative_position else None
        self.blocks = nn.ModuleList(MultiwayBlock(cfg, experts, layer, layers) for layer in range(1, cfg.depth + 1))
        self.norm = Multiway(attention_names(cfg, experts), lambda: nn.LayerNorm(cfg.dim, eps=cfg.norm_eps))

    def forward(self, batch: Batch, needed: Tensor | None = None) -> Tensor:
        """-> x_TD [layout.rows, dim] after the final norm, rows in the order of `batch.Layout`. `needed`, bool
        [layout.rows], names the rows that heads read: the last block leaves the others out, and they come out zero."""
        layout, x_TD = batch.layout, self.embed(batch)
        packed = self.relative_position is None and can_pack(x_TD, layout, self.cfg.dim // self.cfg.heads)
        padding = padding_of(batch, packed=packed)
        biases = [NO_BIAS] * self.cfg.depth if self.relative_position is None else self.relative_position(layout)
        read = None if needed is None else ReadRows.of(needed, layout)
        reads = [*[None] * (self.cfg.depth - 1), read]
        steps = list(zip(self.blocks, biases, reads, self._dice(batch), strict=True))
        if every := self.cfg.activation_checkpointing if self.training else 0:
            for first in range(0, len(steps), every):
                some = steps[first : first + every]
                x_TD = checkpoint(_run, some, x_TD, layout, padding, use_reentrant=False)
        else:
            x_TD = _run(steps, x_TD, layout, padding)
        x_TD = self.norm(x_TD, read or layout)
        return x_TD if read is None else x_TD.new_zeros(layout.rows, self.cfg.dim).index_copy(0, read.places, x_TD)

    def _dice(self, batch: Batch) -> Sequence[Tensor | None]:
        """Each block's [sequences, 2] for drop path: the batch's own, else torch's."""
        if not self.training or self.cfg.drop_path == 0:
            return [None] * self.cfg.depth
        noise = batch.noise
        if noise is None:
            noise = torch.rand(batch.layout.sequences, 2 * self.cfg.depth, device=batch.images.device)
        return noise.split(2, dim=1)

    def embed(self, batch: Batch) -> Tensor:
        """The rows that go into the first block."""
        layout, parts = batch.layout, []
        check_layout(layout, self.cfg, self.expert_names)
        if self.vision_embed is not None:
            # Image-only pictures come before pair pictures, so one view is two kinds of rows.
            parts.append(self.vision_embed(batch).flatten(0, 1))
        if self.text_embed is not None:
            parts += [x.flatten(0, 1) for x in self.text_embed(batch)]
        return torch.cat(parts)


def _run(steps: list[tuple], x_TD: Tensor, layout: Layout, padding: Padding) -> Tensor:
    """Blocks, each with its bias, read rows and dice, one after another."""
    for block, bias, read, dice in steps:
        x_TD = block(x_TD, layout, padding, bias, read, dice)
    return x_TD


def check_experts(experts: Sequence[str]) -> None:
    if unknown := [name for name in experts if name not in EXPERTS]:
        raise ValueError(f"experts={tuple(experts)} holds {unknown[0]!r}, which is none of {', '.join(EXPERTS)}")
    if not {"vision", "language"} & set(experts):
        raise ValueError(f"experts={tuple(experts)} is wrong because it needs vision, language or both")
    if "fusion" in experts and not {"vision", "language"} <= set(experts):
        raise ValueError(f"experts={tuple(experts)} is wrong because fusion stands on vision and language; add both")


def check_layout(layout: Layout, cfg: MultiwayConfig, experts: Sequence[str]) -> None:
    if layout.rows == 0:
        raise ValueError("the batch is empty: its layout has no rows; give it images, pairs or texts")
    for name, rows in (("vision", layout.vision_rows), ("language", layout.language_rows)):
        if rows and name not in experts:
            raise ValueError(
                f"the batch has {rows} {name} rows but this stage's experts={tuple(experts)} hold no {name}; "
                f"add {name!r} to them or take the source out of the mix"
            )
    if layout.images + layout.pairs and layout.patches != cfg.patches:
        raise ValueError(
            f"layout.patches={layout.patches} does not fit the model's {cfg.patches} rows per image; "
            f"use images of {cfg.image_size} pixels and patches of {cfg.patch_size}"
        )
