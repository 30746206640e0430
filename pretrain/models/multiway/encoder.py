"""The Multiway encoder: one packed pass over images, pairs and texts (BEiT-3, arXiv 2208.10442; VLMo, 2111.02358).

Shapes: T rows in the order of `batch.Layout`, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.batch import Batch, Layout, Rows
from pretrain.layers import PLAIN, Layers
from pretrain.models.attention import NO_BIAS, Padding, can_pack, padding_of
from pretrain.models.multiway.block import Multiway, MultiwayBlock, attention_names
from pretrain.models.multiway.config import EXPERTS, MultiwayConfig, check_experts, check_layout
from pretrain.models.multiway.embeddings import RelativePosition, TextEmbedding, VisionEmbedding

M = TypeVar("M", bound=nn.Module)


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
