"""The Multiway encoder: one packed pass over images, pairs and texts (BEiT-3, arXiv 2208.10442; VLMo, 2111.02358).

Shapes: T rows in the order of `batch.Layout`, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.batch import DROP_PATH, Batch, Kinds, Layout
from pretrain.layers import PLAIN, Layers
from pretrain.models.attention import NO_BIAS, Bias, Padding, can_pack, padding_of
from pretrain.models.multiway.block import Multiway, MultiwayBlock, attention_names, drop_path_factor, sequence_of_row
from pretrain.models.multiway.causal_text import CausalText
from pretrain.models.multiway.embeddings import RelativePosition, TextEmbedding, VisionEmbedding
from pretrain.models.multiway.shape import EXPERTS, MultiwayShape, check_experts, check_layout
from pretrain.rows import Rows, take

M = TypeVar("M", bound=nn.Module)
ALL = slice(None)


class MultiwayEncoder(nn.Module):
    """Embeddings, blocks and the final norm. Builds only what a stage with `experts` needs, and raises ValueError for a
    batch with rows of another kind.

    `drop_path` is the rate of the last block; the rate rises linearly from 0 in the first. With `checkpointing` n > 0
    only the input of every n-th block is held for the backward pass. `keep(name)` says whether a pipe stage holds a
    part (vision_embed, blocks.3, norm ...). A part that it does not hold is built all the same and dropped, so that the
    others draw the same numbers as in the whole model.
    """

    def __init__(
        self,
        cfg: MultiwayShape,
        experts: Sequence[str] = EXPERTS,
        layers: Layers = PLAIN,
        *,
        drop_path: float = 0.0,
        checkpointing: int = 0,
        keep: Callable[[str], bool] = lambda part: True,
    ):
        super().__init__()
        check_experts(experts)

        def build(name: str, make: Callable[[], M]) -> M | None:
            part = make()
            return part if keep(name) else None

        self.cfg, self.expert_names, self.share = cfg, tuple(experts), layers.share
        self.drop_path, self.checkpointing, self.compiled = drop_path, checkpointing, False
        self.vision_embed = build("vision_embed", lambda: VisionEmbedding(cfg)) if "vision" in experts else None
        self.text_embed = build("text_embed", lambda: TextEmbedding(cfg, layers)) if "language" in experts else None
        bias = cfg.relative_position
        self.relative_position = build("relative_position", lambda: RelativePosition(cfg, layers)) if bias else None
        self.blocks = nn.ModuleList()
        for number in range(cfg.depth):
            make = partial(MultiwayBlock, cfg, experts, number + 1, layers)
            if block := build(f"blocks.{number}", make):
                self.blocks.add_module(str(number), block)
        last = partial(nn.LayerNorm, cfg.dim, eps=cfg.norm_eps) if cfg.final_norm else nn.Identity
        norm = partial(Multiway, attention_names(cfg, experts), last)
        self.norm = cast(Multiway, build("norm", norm))

    def forward(self, batch: Batch, needed: Kinds | None = None) -> Kinds:
        """See contracts.Encoder. The last block leaves out the rows that are not `needed`, which come out as zeros."""
        x_TD = self.rows(batch, None if needed is None else needed.pack())
        return Kinds.split(x_TD, batch.layout)

    def rows(self, batch: Batch, needed: Tensor | None = None) -> Tensor:
        """-> x_TD [layout.rows, dim] after the final norm, in the order of `batch.Layout`. `needed`: bool
        [layout.rows]; if it lies on the host, reading it waits for no device. Rows of padding may hold anything."""
        return self.finish(self.embed(batch), batch, needed)

    def embed(self, batch: Batch) -> Tensor:
        """The rows [layout.rows, dim] that go into the first block, padding among them."""
        layout, parts = batch.layout, []
        check_layout(layout, self.cfg, self.expert_names)
        if self.vision_embed is not None:
            # Image-only pictures come before pair pictures, so one view is two kinds of rows.
            parts.append(self.vision_embed(batch).flatten(0, 1))
        if self.text_embed is not None:
            parts += [x.flatten(0, 1) for x in self.text_embed(batch)]
        return torch.cat(parts)

    def finish(self, x_TD: Tensor, batch: Batch, needed: Tensor | None = None) -> Tensor:
        """The part of `rows` after the embedding."""
        batch = batch.indexed()
        own, read, join = self.share(batch, needed)
        x_TD = self._blocks(x_TD if own is None else take(x_TD, own.places), batch, own, read)
        return join(self.norm(x_TD, read or own or batch.layout))

    def run(self, x_TD: Tensor, batch: Batch) -> Tensor:
        """All rows of the pass, [layout.rows, dim] -> the same, through the blocks that a pipe stage holds; padding
        comes out as zeros. Only the batch's layout, its places of padding and its draws for drop path are read."""
        batch = batch.indexed()
        own, _, join = self.share(batch, None)
        return join(self._blocks(x_TD if own is None else take(x_TD, own.places), batch, own, None))

    def depths(self, batch: Batch, after: Sequence[int]) -> list[Tensor]:
        """The rows [layout.rows, dim] behind each of the blocks `after`, rising numbers counted from 1, without the
        final norm; padding comes out as zeros. The last number must be the last block's, since every module must run on
        every call."""
        assert after and after[-1] == self.cfg.depth, after
        batch, rows = batch.indexed(), []
        own, _, join = self.share(batch, None)
        x_TD = self.embed(batch)
        x_TD = x_TD if own is None else take(x_TD, own.places)
        for first, last in pairwise((0, *after)):
            x_TD = self._blocks(x_TD, batch, own, None, slice(first, last))
            rows.append(join(x_TD))
        return rows

    def _blocks(self, x_TD: Tensor, batch: Batch, own: Rows | None, read: Rows | None, some: slice = ALL) -> Tensor:
        """The rows `own` through the blocks that this rank holds, or through `some` of them; `read` as for a block."""
        steps = self._steps(batch, own, read, x_TD.dtype)[some]
        packed = self.relative_position is None and can_pack(x_TD, batch.layout, self.cfg.head_width)
        padding = padding_of(batch, packed=packed)
        same = (batch.layout, padding, own, self.compiled)
        every = self.checkpointing if self.training else 0
        for first in range(0, len(steps), every or len(steps)):
            part = steps[first : first + (every or len(steps))]
            x_TD = checkpoint(_run, part, x_TD, *same, use_reentrant=False) if every else _run(part, x_TD, *same)
        return x_TD

    def _steps(self, batch: Batch, own: Rows | None, read: Rows | None, dtype: torch.dtype) -> list[Step]:
        """One Step for each block that this rank holds."""
        biases = None if self.relative_position is None else self.relative_position(batch.layout)
        draws = self._drop_path_draws(batch)
        sequences = sequence_of_row(batch.layout, batch.images.device) if draws is not None else None
        if sequences is not None and own is not None:
            sequences = sequences.index_select(0, own.places)
        steps = []
        for name, block in self.blocks.named_children():
            number = int(name)
            bias = NO_BIAS if biases is None else biases[number]
            factors = None
            if draws is not None and sequences is not None and self.drop_rate(number):
                factors = drop_path_factor(self.drop_rate(number), draws[number]).to(dtype).index_select(0, sequences)
            steps.append(Step(block, bias, read if number == self.cfg.depth - 1 else None, factors))
        return steps

    def _drop_path_draws(self, batch: Batch) -> Sequence[Tensor] | None:
        """Each block's random numbers [sequences, 2] for drop path: the batch's own, else torch's; None if nothing is
        dropped."""
        if not self.training or self.drop_path == 0:
            return None
        draws = batch.draws.get(DROP_PATH)
        if draws is None:
            draws = torch.rand(batch.layout.sequences, 2 * self.cfg.depth, device=batch.images.device)
        return draws.split(2, dim=1)

    def drop_rate(self, number: int) -> float:
        """Drop path's rate in block `number`, counted from 0."""
        return self.drop_path * number / max(self.cfg.depth - 1, 1)

    @property
    def token_table(self) -> nn.Parameter | None:
        return None if self.text_embed is None else cast(nn.Parameter, self.text_embed.tokens.weight)

    def causal_text(self, images: Tensor, longest: int) -> CausalText:
        """Reads texts of up to `longest` words behind their pictures, uint8 [N, 3, H, W], a few words at a time."""
        return CausalText(self, images, longest)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile every block, in place and at first use; names and weights stay as they are.

        Blocks of one kind share their code, so that a model compiles three or four times whatever its depth: drop path
        drops nothing in the first block, the top ones may have a third expert, and the last leaves rows out. Masks and
        lengths change the numbers of rows, which `mark_changing` marks, so that they do not compile again.
        """
        self.compiled = True
        for block in self.blocks:
            block.compile(backend=backend)


class Step(NamedTuple):
    """One block, and its arguments beside the rows."""

    block: nn.Module
    bias: Bias
    read: Rows | None
    factors: Tensor | None


def _run(steps: list[Step], x_TD: Tensor, layout: Layout, padding: Padding, own: Rows | None, compiled: bool) -> Tensor:
    """The rows through some blocks, one after another."""
    for block, bias, read, factors in steps:
        if compiled:
            mark_changing(layout, x_TD, factors, padding, own, read)
        x_TD = block(x_TD, layout, padding, bias, own, read, factors)
    return x_TD


def mark_changing(
    layout: Layout, x_TD: Tensor, factors: Tensor | None, padding: Padding, own: Rows | None, read: Rows | None
) -> None:
    """Tell the compiler which tensors have numbers of rows that change from batch to batch."""
    rows: list[Tensor | None] = [padding.pair_places, padding.text_places]
    rows += [padding.packing.joined] if padding.packing is not None else []
    for some in (own, padding.rows, read):
        if some is not None:
            rows.append(some.places)
            rows += [part for part, count in zip(some.by_kind, layout.counts, strict=True) if len(part) != count]
    rows += [x_TD, factors] if own is not None else []
    for value in rows:
        if value is not None and len(value) > 1:  # the compiler always treats 0 and 1 as constants
            # `maybe`: where sequence ranks exchange rows, the compiler may treat a number as a constant.
            torch._dynamo.maybe_mark_dynamic(value, 0)
