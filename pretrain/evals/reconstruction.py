"""How well the visual tokenizer represents held-out pictures: its loss, the use of its codes, and reconstructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pretrain.batch import Layout, make_batch
from pretrain.contracts import Evaluation
from pretrain.data.sources import ImageShards
from pretrain.evals.trained import Trained, check_counts, uint8_pictures

SHOWN = 8


@dataclass(frozen=True)
class Reconstruction(Evaluation):
    """The distillation loss, the percent of codes in use, and their perplexity (the number of evenly used codes that
    would have the same entropy)."""

    images: ImageShards
    samples: int = 512
    batch: int = 128

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)

    def problems(self, stage: Any) -> list[str]:
        if stage.model is not None and not stage.model.encodes:
            return []
        return ["evals: Reconstruction needs a stage that trains a visual tokenizer; take it out of this one"]

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        """-> numbers for eval.json, and samples for the report."""
        tokenizer = trained.task.tokenizer
        counts = torch.zeros(tokenizer.cfg.codes, dtype=torch.double)
        total = 0.0
        shown: list[dict] = []
        left = samples = min(self.samples, trained.samples_of(self.images))
        for batch in trained.batches({"images": self.images}, min(self.batch, samples), samples):
            # Without the pictures that fill up the last batch.
            images = batch.images[:left]
            left -= len(images)
            own = make_batch(Layout(images=len(images), patches=batch.layout.patches), images=images)
            total += len(images) * trained.task(own)["loss/distill"].item()
            codes = tokenizer.encode(images)
            counts += codes.cpu().flatten().bincount(minlength=len(counts))
            if not shown and trained.draw_codes is not None:
                pictures, drawn = uint8_pictures(images), trained.draw_codes(codes)
                shown = [
                    {
                        "input": trained.save_picture(pictures[i], f"input{i}"),
                        "predicted": trained.save_picture(drawn[i], f"predicted{i}"),
                    }
                    for i in range(min(SHOWN, len(pictures)))
                ]
        share = counts / counts.sum()
        entropy = -(share * share.clamp(min=1e-12).log()).sum()
        metrics = {
            "tokenizer/distill_loss": total / samples,
            "tokenizer/codes_used": 100 * (counts > 0).double().mean().item(),
            "tokenizer/perplexity": entropy.exp().item(),
        }
        return metrics, {"masked": shown}
