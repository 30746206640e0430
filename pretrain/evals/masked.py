"""Masked accuracy on held-out data, beside the baseline of always predicting the most frequent target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import Batch
from pretrain.contracts import Evaluation
from pretrain.evals.masked_samples import masked_samples
from pretrain.evals.trained import Trained, check_counts, missing_head


@dataclass(frozen=True)
class MaskedAccuracy(Evaluation):
    """Percent of hidden patches' codes and hidden words predicted right, by kind of sequence. The baseline is the best
    that a constant answer could reach on these very targets."""

    mix: dict[str, Any]
    samples: int = 512
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "masked")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        """-> percentages for eval.json, and samples for the report."""
        heads = trained.head("masked")
        predictions: dict[str, list[Tensor]] = {}
        shown: list[dict] = []
        samples = min(self.samples, *(trained.samples_of(source) for source in self.mix.values()))
        size = min(self.batch, samples)
        for number, batch in enumerate(trained.batches(self.mix, size, samples, masking=trained.masking)):
            batch = first_hidden(batch, size, samples - number * size)
            answers = heads.predict(trained.task.encoder(batch), batch)
            for part, pairs in answers.items():
                predictions.setdefault(part, []).append(torch.stack(pairs).cpu())
            if not shown:
                shown = masked_samples(trained, batch, answers)
        metrics: dict[str, float] = {}
        for part, batches in predictions.items():
            prediction, target = torch.cat(batches, dim=1)
            if len(target):
                metrics[f"masked/{part}/accuracy"] = 100 * (prediction == target).double().mean().item()
                metrics[f"masked/{part}/baseline"] = 100 * target.bincount().max().item() / len(target)
        return metrics, {"masked": shown}


def first_hidden(batch: Batch, size: int, left: int) -> Batch:
    """A batch with `size` sequences of each source, in which nothing is hidden of those beyond the first `left`: they
    fill up the last batch and have been counted before."""
    if left >= size:
        return batch

    def first(hidden: Tensor) -> Tensor:
        return hidden & (torch.arange(len(hidden), device=hidden.device) % size < left).unsqueeze(1)

    masks = {name: first(getattr(batch, name)) for name in ("image_masks", "pair_masked", "text_masked")}
    return replace(batch, **masks).indexed()
