"""What DeepSpeed wraps: a batch goes in, named losses come out."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.layers import PLAIN, Layers
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.models.multiway.encoder import MultiwayEncoder


class PretrainTask(nn.Module):
    """The encoder and a stage's objectives. `objectives` are configs with `.name` and `.build(model, experts, layers,
    tokens)`, where `tokens` is the text embedding's table or None."""

    def __init__(
        self, model: MultiwayConfig, experts: tuple[str, ...], objectives: tuple[Any, ...], layers: Layers | None = None
    ):
        super().__init__()
        layers = layers or PLAIN
        self.encoder = MultiwayEncoder(model, experts, layers)
        text = self.encoder.text_embed
        tokens = None if text is None else cast(nn.Parameter, text.tokens.weight)
        self.objectives = nn.ModuleDict(
            {objective.name: objective.build(model, experts, layers, tokens) for objective in objectives}
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """-> `loss` (the sum of the objectives'), and what each objective reports, all scalars."""
        # One packed pass; in the last block only the rows that a head reads are carried to the end.
        return self.score(self.encoder(batch, needed=self.needed_rows(batch)), batch)

    def score(self, rows_TD: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What `forward` returns, from the encoder's rows [layout.rows, dim]."""
        reports = {name: objective(rows_TD, batch) for name, objective in self.objectives.items()}
        losses = [report.pop("loss") for report in reports.values()]
        named = {f"loss/{name}": loss.detach() for name, loss in zip(reports, losses, strict=True)}
        if len(named) == 1:
            named = {}  # the one objective's loss is the loss
        return {"loss": torch.stack(losses).sum(), **named, **{k: v for r in reports.values() for k, v in r.items()}}

    def needed_rows(self, batch: Batch) -> Tensor:
        """bool [layout.rows]: what any of the objectives reads."""
        needed = [cast(Any, objective).needed_rows(batch) for objective in self.objectives.values()]
        return torch.stack(needed).any(0)

    def before_training(self, batches: list[Batch]) -> None:
        """Nothing to prepare; see TokenizerTask."""

    def after_step(self) -> None:
        """Nothing to do after the optimizer's step; see TokenizerTask."""
