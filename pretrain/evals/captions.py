"""Captions of held-out pictures, scored against people's by CIDEr-D (data/cider.py), with a few for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from pretrain.contracts import Evaluation
from pretrain.data.cider import cider
from pretrain.data.labelled import REFERENCES, ReferenceShards
from pretrain.data.transforms import sample_rng
from pretrain.evals.coco_metrics import METRICS, coco_metrics
from pretrain.evals.trained import Trained, check_counts, uint8_pictures
from pretrain.models.generation import NextWord, Writing, next_word_head, text_reader, write

SHOWN = 10


@dataclass(frozen=True)
class CaptionScore(Evaluation):
    """CIDEr-D in percent, of which people's captions have about 100. `writing` as for pretrain.caption. The baseline is
    the score of people's captions of the next picture. `more`: further metrics of pycocoevalcap (coco_metrics.py):
    BLEU, ROUGE, and with a Java METEOR and SPICE. `name` distinguishes the numbers of several CaptionScores."""

    pairs: ReferenceShards
    samples: int = 5000
    batch: int = 32
    writing: Writing = field(default_factory=Writing)
    more: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self) -> None:
        check_counts(samples=self.samples, batch=self.batch)
        if not set(self.more) <= set(METRICS):
            raise ValueError(f"evals: more={self.more} is unknown; use some of {', '.join(METRICS)}")

    def problems(self, stage: Any) -> list[str]:
        names = {objective.name for objective in stage.objectives}
        if names & {"captioning", "masked"}:
            return []
        return ["evals: CaptionScore needs a stage with MaskedCaptioning() or Captioning(); take it out of this one"]

    @torch.no_grad()
    def run(self, trained: Trained) -> tuple[dict[str, float], dict]:
        task: Any = trained.task
        found = next_word_head(task.objectives, trained.text.mask_id)
        if found is None:
            raise ValueError("evals: CaptionScore needs a head of words, and this stage's hides none; take it out")
        captions, references, shown = list[str](), list[tuple[str, ...]](), list[dict]()
        samples = min(self.samples, trained.samples_of(self.pairs))
        for batch in trained.batches({"pairs": self.pairs}, min(self.batch, samples), samples):
            texts = self._write(trained, batch, len(captions), *found)
            for number, text in enumerate(texts[: max(SHOWN - len(shown), 0)]):
                picture = trained.save_picture(uint8_pictures(batch.images)[number], f"caption{self.name}{len(shown)}")
                given = " / ".join(batch.extra[REFERENCES][number][:2])
                shown.append({"input": picture, "references": given, "written": text})
            captions += texts
            references += batch.extra[REFERENCES]
        references = references[:samples]
        scores, others = cider(captions[:samples], references), other_captions(references)
        values: dict[str, Any] = {"captions/CIDEr": _percent(scores), "captions/baseline": _percent(others)}
        values |= coco_metrics(self.more, captions[:samples], references)
        own = f"captions/{self.name}/" if self.name else "captions/"
        values = {key.replace("captions/", own, 1): value for key, value in values.items()}
        return values, {own.removesuffix("/"): shown}

    def _write(self, trained: Trained, batch: Any, first: int, logits: Any, mask_id: int | None) -> list[str]:
        """The texts of a batch, whose pictures have the numbers from `first` on; each draws its words by its own."""
        task: Any = trained.task
        longest = min(self.writing.max_words, batch.layout.pair_len - 1)
        how = replace(self.writing, max_words=longest)
        drawn = [sample_rng(0, 0, first + number).random(longest) for number in range(len(batch.images))]
        reader = text_reader(task.encoder, batch.images, batch.layout.patches, longest + 1)
        next_word = NextWord(reader, logits, trained.text.mask_id, mask_id)
        ids = write(next_word, len(batch.images), how, torch.from_numpy(np.stack(drawn)), trained.device)
        return [trained.text.decode(row) for row in ids.tolist()]


def other_captions(references: Sequence[Sequence[str]]) -> list[float]:
    """The scores of people's captions of the next picture, which are fluent but about something else."""
    first = [texts[0] for texts in references]
    return cider(first[1:] + first[:1], references)


def _percent(scores: Sequence[float]) -> float:
    return 100 * sum(scores) / len(scores)
