"""The Multiway encoder: one packed pass over images, pairs and texts (BEiT-3, arXiv 2208.10442; VLMo, 2111.02358).

Shapes: T rows in the order of `batch.Layout`, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.batch import Batch, Layout, Rows
from pretrain.layers import PLAIN, Layers
from pretrain.models.attention import NO_BIAS, Padding, can_pack, padding_of
from pretrain.models.block import Multiway, MultiwayBlock, attention_names
from pretrain.models.embeddings import RelativePosition, TextEmbedding, VisionEmbedding

EXPERTS = ("vision", "language", "fusion")
M = TypeVar("M", bound=nn.Module)


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


class MultiwayEncoder(nn.Module):
    """Embeddings, blocks and the final norm. Builds only what a stage with `experts` needs; a batch with rows for which
    nothing was built is a ValueError.

    `keep` is asked for each part by its name (vision_embed, blocks.3, norm ...). One that is not kept is built all the
    same and let go: the others begin with the numbers that they have in the whole.
    """

    def __init__(
        self,
        cfg: MultiwayConfig,
        experts: Sequence[str] = EXPERTS,
        layers: Layers = PLAIN,
        keep: Callable[[str], bool] = lambda part: True,
    ):
        super().__init__()
        check_experts(experts)

        def kept(name: str, make: Callable[[], M]) -> M | None:
            part = make()
            return part if keep(name) else None

        self.cfg, self.expert_names, self.share = cfg, tuple(experts), layers.share
        self.vision_embed = kept("vision_embed", lambda: VisionEmbedding(cfg)) if "vision" in experts else None
        self.text_embed = kept("text_embed", lambda: TextEmbedding(cfg, layers)) if "language" in experts else None
        bias = cfg.relative_position
        self.relative_position = kept("relative_position", lambda: RelativePosition(cfg, layers)) if bias else None
        self.blocks = nn.ModuleList()
        for layer in range(1, cfg.depth + 1):
            name = str(layer - 1)
            if block := kept(f"blocks.{name}", partial(MultiwayBlock, cfg, experts, layer, layers)):
                self.blocks.add_module(name, block)
        norm = partial(Multiway, attention_names(cfg, experts), lambda: nn.LayerNorm(cfg.dim, eps=cfg.norm_eps))
        self.norm = cast(Multiway, kept("norm", norm))

    def forward(self, batch: Batch, needed: Tensor | None = None) -> Tensor:
        """-> x_TD [layout.rows, dim] after the final norm, rows in the order of `batch.Layout`. `needed`, bool
        [layout.rows], names the rows that heads read: the last block leaves the others out, and they come out zero."""
        return self.finish(self.embed(batch), batch, needed)

    def finish(self, x_TD: Tensor, known: Batch, needed: Tensor | None = None) -> Tensor:
        """Of `forward` what comes after the embedding; of `known` see `run`."""
        own, read, join = self.share(known.layout, needed, x_TD.device)
        if own is not None:
            x_TD = x_TD.index_select(0, own.places)
        x_TD = self.run(x_TD, known, own, read)
        return join(self.norm(x_TD, read or own or known.layout))

    def run(self, x_TD: Tensor, known: Batch, own: Rows | None = None, read: Rows | None = None) -> Tensor:
        """Rows through the blocks that were kept; `own` and `read` as for a block. Of `known` are asked the layout,
        where inputs are padding, and the dice."""
        cfg, layout = self.cfg, known.layout
        packed = self.relative_position is None and can_pack(x_TD, layout, cfg.dim // cfg.heads)
        padding = padding_of(known, packed=packed)
        biases = [NO_BIAS] * cfg.depth if self.relative_position is None else self.relative_position(layout)
        reads, dice = [*[None] * (cfg.depth - 1), read], self._dice(known)
        numbers = [int(name) for name, _ in self.blocks.named_children()]
        steps = [(block, biases[n], reads[n], dice[n]) for n, block in zip(numbers, self.blocks, strict=True)]
        every = cfg.activation_checkpointing if self.training else 0
        for first in range(0, len(steps), every or len(steps)):
            some = steps[first : first + (every or len(steps))]
            if every:
                x_TD = checkpoint(_run, some, x_TD, layout, padding, own, use_reentrant=False)
            else:
                x_TD = _run(some, x_TD, layout, padding, own)
        return x_TD

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


def _run(steps: list[tuple], x_TD: Tensor, layout: Layout, padding: Padding, own: Rows | None) -> Tensor:
    """Blocks, each with its bias, read rows and dice, one after another."""
    for block, bias, read, dice in steps:
        x_TD = block(x_TD, layout, padding, bias, own, read, dice)
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
