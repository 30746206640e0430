"""Does a model tell a picture's caption from one with a fact changed? For benchmarks.claims."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.random import Generator
from torch import Tensor

from pretrain.contracts import Evaluation
from pretrain.data.labelled import metadata
from pretrain.data.sources import METADATA, PairShards, Raw, caption_ids
from pretrain.evals.matching import margin, preferred
from pretrain.evals.trained import Trained, missing_head

FOIL = "foil"


@dataclass(frozen=True)
class FoilShards(PairShards):
    """Pairs whose JSON has a wrong caption too -> extra["foil"], int64 [text_len]."""

    @property
    def wanted(self) -> tuple[str, ...]:
        return (*super().wanted, METADATA)

    def decode(self, members: Mapping, transform: Any, tokenizer: Any, rng: Generator) -> Raw:
        ids = caption_ids(metadata(members)[FOIL], tokenizer, self.text_len)
        return super().decode(members, transform, tokenizer, rng)._replace(extra={FOIL: ids})


@dataclass(frozen=True)
class FoilChoice(Evaluation):
    """How well the head of matching tells a picture's own caption from the wrong one, in percent. `choice`: of how many
    pictures it prefers the own caption; `accuracy`: of how many captions, each seen alone, it rightly says whether they
    fit. Chance is 50 for both."""

    pairs: FoilShards
    samples: int = 480
    batch: int = 96

    def problems(self, stage: Any) -> list[str]:
        return missing_head(stage, "matching")

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        """-> percentages for eval.json; nothing for the report's samples."""
        margins = list[Tensor]()
        for batch in trained.batches({"pairs": self.pairs}, self.batch, self.samples):
            wrong = torch.as_tensor(batch.extra[FOIL])
            foiled = replace(batch, pair_tokens=wrong, pair_inputs=wrong).indexed()
            margins.append(torch.stack([margin(trained, batch), margin(trained, foiled)]).cpu())
        own, foils = torch.cat(margins, 1)[:, : self.samples]
        right = torch.cat([own > 0, foils <= 0])
        return {
            "foils/choice": preferred(own, foils),
            "foils/accuracy": 100 * right.double().mean().item(),
        }, {}
