"""The part of a PretrainTask that one pipe stage holds, and where the blocks are cut.

Pipe stages hand on one tensor of a fixed shape [T + E, D]: the packed rows x_TD, and below them a sheet of zeros and
ones (exact in bf16) with what the stages in the middle cannot know, since only the first and the last one load data:

    pair text rows: 1, padding 0 | text-only rows likewise | branches that drop path keeps: 1 | zeros to fill a row
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import DROP_PATH, PAD, UNK, Batch, Kinds, Layout, make_batch
from pretrain.contracts import Objective
from pretrain.flops import encoder_flops, product_flops
from pretrain.layers import PLAIN, Layers
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.shape import check_layout
from pretrain.parallel.partition import cut, stage_costs
from pretrain.tasks.pretrain import PretrainTask, head_products

log = logging.getLogger(__name__)


class PipelineTask(PretrainTask):
    """What pipe stage `stage` holds: the blocks bounds[stage] .. bounds[stage + 1] - 1 (counted from 0), in the first
    stage also the embeddings, in the last the final norm and the objectives. Names and initial numbers are those of a
    PretrainTask from the same seed; every micro-batch has `layout`.

    `shared`: {name of a weight that several stages hold: these stages}, for a tied text head and the table of relative
    positions; its gradients are summed over them.
    """

    watches = False  # the report is sent before the backward pass, which would fill in the gradients' squares

    def __init__(
        self,
        model: MultiwayConfig,
        experts: tuple[str, ...],
        objectives: Sequence[Objective],
        layers: Layers = PLAIN,
        *,
        layout: Layout,
        bounds: Sequence[int],
        stage: int,
        drop_path: float = 0.0,
        checkpointing: int = 0,
    ):
        nn.Module.__init__(self)  # PretrainTask's own would build all of it
        self.loss_weights = None
        check_layout(layout, model, experts)
        self.layout, self.stage, self.stages = layout, stage, len(bounds) - 1
        self.last = stage == self.stages - 1
        blocks = [f"blocks.{number}" for number in range(bounds[stage], bounds[stage + 1])]
        # The last stage keeps the text embedding until the heads are built, one of which may tie itself to it.
        first = ["vision_embed", "text_embed"] if stage == 0 else []
        last = ["text_embed", "norm"] if self.last else []
        own = {*first, "relative_position", *blocks, *last}
        options: dict[str, Any] = {"drop_path": drop_path, "checkpointing": checkpointing}
        self.encoder = MultiwayEncoder(model, experts, layers, **options, keep=own.__contains__)
        text = self.encoder.text_embed
        # A stand-in for the table, so that every stage learns whether an objective ties itself to it.
        table = self.encoder.token_table
        tokens = nn.Parameter(torch.empty(0)) if table is None else table
        self.objectives, tied = nn.ModuleDict(), False
        for objective in objectives:
            head = objective.build(model, experts, layers, tokens)
            tied = tied or any(value is tokens for value in head.parameters())
            if self.last:
                self.objectives[objective.name] = head
        if stage > 0 and text is not None:
            text.positions = text.norm = None
            self.encoder.text_embed = text if tied else None
        self.shared: dict[str, tuple[int, ...]] = {}
        if tied:
            self.shared["encoder.text_embed.tokens.weight"] = (0, self.stages - 1)
        if model.relative_position:
            self.shared["encoder.relative_position.table"] = tuple(range(self.stages))

    def forward(self, arrived: Tensor | None, batch: Batch | None = None) -> Any:  # type: ignore[override]
        """`arrived`: [T + E, D] from the stage before, None on the first; `batch`: on the first and the last.
        -> [T + E, D] for the next stage; on the last, what PretrainTask returns."""
        assert batch is None or batch.layout == self.layout, (batch.layout, self.layout)
        if arrived is None:
            assert batch is not None
            x_TD = self.encoder.embed(batch)
            sheet_ED = self._write_sheet(batch, x_TD)
        else:
            x_TD, sheet_ED = arrived.split([self.layout.rows, len(arrived) - self.layout.rows])
        sheet_ED = sheet_ED.detach()
        known = self._read_sheet(sheet_ED)
        if batch is not None:  # its index is known without waiting for the device, the sheet is not
            batch = known = batch.indexed().with_tensors({f"draws/{name}": own for name, own in known.draws.items()})
        if not self.last:
            return torch.cat([self.encoder.run(x_TD, known), sheet_ED])
        assert batch is not None
        rows = self.encoder.finish(x_TD, known, self.needed_rows(batch.on_host).pack())
        return self.score(Kinds.split(rows, self.layout), batch)

    def _write_sheet(self, batch: Batch, x_TD: Tensor) -> Tensor:
        """The sheet [E, D] of a batch; see the top of this file."""
        flags = [(ids != PAD).flatten() for ids in (batch.pair_inputs, batch.text_inputs)]
        if self._draw_count:
            depth, draws = self.encoder.cfg.depth, batch.draws.get(DROP_PATH)
            if draws is None:
                draws = torch.rand(self.layout.sequences, 2 * depth, device=x_TD.device)
            rates = [rate for number in range(depth) for rate in [self.encoder.drop_rate(number)] * 2]
            flags.append((draws >= draws.new_tensor(rates)).flatten())
        written = torch.cat(flags).to(x_TD.dtype)
        return F.pad(written, (0, -len(written) % x_TD.shape[1])).view(-1, x_TD.shape[1])

    def _read_sheet(self, sheet_ED: Tensor) -> Batch:
        """A batch without content that has the padding and the draws for drop path which the sheet says."""
        layout = self.layout
        sizes = [layout.pair_text_rows, layout.text_rows, self._draw_count]
        pairs, texts, draws = sheet_ED.flatten()[: sum(sizes)].split(sizes)
        return make_batch(
            layout,
            images=sheet_ED.new_zeros(layout.images + layout.pairs, 3, 1, 1, dtype=torch.uint8),
            pair_tokens=torch.where(pairs > 0, UNK, PAD).view(layout.pairs, layout.pair_len),
            text_tokens=torch.where(texts > 0, UNK, PAD).view(layout.texts, layout.text_len),
            # The flags serve as draws: a block drops a branch whose draw is below its rate, so 0 is dropped, 1 is not.
            draws={DROP_PATH: draws.view(layout.sequences, -1)} if self._draw_count else {},
        )

    @property
    def _draw_count(self) -> int:
        return self.layout.sequences * 2 * self.encoder.cfg.depth if self.encoder.drop_path else 0


# ---- where to cut


def pipeline_bounds(
    model: MultiwayConfig, objectives: Sequence[Objective], layout: Layout, stages: int, *, checkpointing: int = 0
) -> tuple[int, ...]:
    """The bounds [stages + 1] of the pipe stages' blocks, chosen so that all stages have about the same FLOPs; logs a
    small table. There must not be more stages than blocks, which parallel/legal.py checks."""
    costs = block_flops(model, objectives, layout, checkpointing=checkpointing)
    bounds = cut(costs, stages)
    flops, total = stage_costs(costs, bounds), sum(costs)
    log.info("pipeline of %d stages, FLOPs of one micro-batch forward and backward:", stages)
    for stage, each in enumerate(flops):
        besides = (" and embeddings" if stage == 0 else "") + (" and heads" if stage == stages - 1 else "")
        blocks = f"blocks {bounds[stage]} to {bounds[stage + 1] - 1}{besides}"
        log.info("  stage %d  %-36s %9.3f GFLOP  %4.1f %%", stage, blocks, each / 1e9, 100 * each / max(total, 1))
    return bounds


def block_flops(
    model: MultiwayConfig, objectives: Sequence[Objective], layout: Layout, *, checkpointing: int = 0
) -> list[float]:
    """The FLOPs of each block, as flops.py counts them; the first includes the embeddings, and the last the heads, but
    not the rows that no head reads."""
    size = {"dim": model.dim, "ffn_dim": model.ffn_dim}
    costs = [float(encoder_flops(layout, depth=1, **size))] * model.depth
    products = head_products(objectives, layout, model)
    unread = max(layout.rows - sum(product.rows for product in products), 0)
    costs[-1] -= 3 * 2 * unread * (model.dim**2 + 2 * model.dim * model.ffn_dim)
    if checkpointing:
        costs = [cost * 4 / 3 for cost in costs]  # their forward pass runs twice
    costs[0] += encoder_flops(layout, depth=0, patch_inputs=3 * model.patch_size**2, **size)
    costs[-1] += product_flops(products)
    return costs
