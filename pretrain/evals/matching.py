"""Can a model distinguish a picture's own caption from another picture's? On held-out data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import Batch, Kinds
from pretrain.contracts import Evaluation
from pretrain.evals.trained import Trained, check_counts, missing_head


@dataclass(frozen=True)
class MatchingAccuracy(Evaluation):
    """Percent of right decisions, two for each picture: with its own caption, and with that of the next picture of the
    batch (left out if the two texts are equal). Always deciding the same gives the baseline, near 50. `choice`: percent
    of pictures whose own caption fits better than the other, whatever is decided on each (chance is 50). After hard
    negatives the head may reject nearly every pair and still rank captions well."""

    pairs: Any
    samples: int = 512
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(samples=self.samples)
        if self.batch < 2:
            raise ValueError(f"evals: batch={self.batch} leaves no other caption; use 2 or more")

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "matching")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        """-> percentages for eval.json, and no samples."""
        own_margins, other_margins, different = list[Tensor](), list[Tensor](), list[Tensor]()
        samples = min(self.samples, trained.samples_of(self.pairs))
        if samples < 2:
            raise ValueError(f"evals: matching needs another pair's caption, and its source has {samples} pairs")
        for batch in trained.batches({"pairs": self.pairs}, min(self.batch, samples), samples):
            tokens = batch.pair_tokens.roll(1, 0)
            different.append((tokens != batch.pair_tokens).any(-1).cpu())
            own_margins.append(margin(trained, batch).cpu())
            changed = replace(batch, pair_tokens=tokens, pair_inputs=tokens).indexed()
            other_margins.append(margin(trained, changed).cpu())
        # Without the pairs that fill up the last batch.
        own, there, others = (torch.cat(each)[:samples] for each in (own_margins, different, other_margins))
        others = others[there]
        total = len(own) + len(others)
        return {
            "matching/accuracy": 100 * ((own > 0).sum() + (others <= 0).sum()).item() / total,
            "matching/baseline": 100 * max(len(own), len(others)) / total,
            "matching/choice": preferred(own[there], others),
        }, {}


def preferred(own: Tensor, others: Tensor) -> float:
    """Percent of the margins `own` [N] that are above `others` [N]; a tie counts half."""
    return 100 * ((own > others).double() + 0.5 * (own == others).double()).mean().item()


def margin(trained: Trained, batch: Batch) -> Tensor:
    """fp32 [pairs]: the logit that a pair belongs together minus the logit that it does not."""
    first = Kinds.rows_of(batch.layout, torch.device("cpu"), first=True)
    needed = first._replace(pair_texts=torch.zeros_like(first.pair_texts))
    rows = trained.task.encoder(batch, needed=needed).first.pair_images
    logits = trained.head("matching").match(rows).float()
    return logits[:, 1] - logits[:, 0]
