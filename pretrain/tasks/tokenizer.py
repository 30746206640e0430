"""What DeepSpeed wraps in a stage that trains a visual tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pretrain.batch import Batch
from pretrain.models.visual_tokenizer.vqkd import VQKD, VQKDConfig


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
