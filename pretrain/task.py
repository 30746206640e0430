"""What DeepSpeed wraps: a batch goes in, named losses come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.layers import PLAIN, Layers
from pretrain.models.multiway import MultiwayConfig, MultiwayEncoder
from pretrain.models.vqkd import VQKD, VQKDConfig


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


class TokenizerTask(nn.Module):
    """VQ-KD, the visual tokenizer (BEiT v2, arXiv 2208.06366, 2.2): learn codes from which a frozen teacher's patch
    targets can be told. The teacher is no submodule: it is neither trained nor saved."""

    def __init__(self, config: VQKDConfig, teacher: Callable[[Tensor], Tensor]):
        super().__init__()
        self.tokenizer = VQKD(config)
        self._teacher = [teacher]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            target = self._teacher[0](batch.images)
        report = self.tokenizer(batch.images, target)
        return {"loss": report["loss"]} | {_report_name(k): v for k, v in report.items() if k != "loss"}

    def before_training(self, batches: list[Batch]) -> None:
        """Start the codebook by k-means on the first global batch."""
        self.tokenizer.start_codebook([batch.images for batch in batches])

    def after_step(self) -> None:
        """Move the codebook by what all micro-steps and ranks assigned to it."""
        self.tokenizer.after_step()


def _report_name(name: str) -> str:
    return name if name.startswith("codebook") else f"loss/{name}"
