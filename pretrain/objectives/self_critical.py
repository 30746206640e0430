"""CIDEr optimisation: self-critical training of captions (Rennie et al., arXiv 1612.00563). Texts are drawn from the
model, and the log-probability of each is raised in proportion to how far its CIDEr-D is above a baseline's.

BEiT-3 was fine-tuned without it (arXiv 2208.10442, 3.1.3), so that no settings are published for this model. Texts are
written as MaskedCaptioning's are, with a <mask> where the next word will stand; Oscar and VinVL do the same
(microsoft/Oscar, oscar/modeling/modeling_bert.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.batch import EOS, PAD, Batch, Kinds, Layout
from pretrain.contracts import Encoder, Objective, Pass
from pretrain.data.cider import Frequencies, cider
from pretrain.data.labelled import REFERENCES
from pretrain.flops import Product
from pretrain.layers import PLAIN, Layers
from pretrain.models.generation import NextWord, Writing, text_reader, write

BASELINES = ("greedy", "mean")


@dataclass(frozen=True)
class SelfCritical(Objective):
    """For the mix's `pairs`, from RewardShards. Its head is MaskedData's head of words, which a stage of
    MaskedCaptioning trains. `samples` texts are drawn for each picture. The baseline of each is the score of the
    most likely text ("greedy", Rennie's) or the mean score of the picture's other texts ("mean"; Luo, arXiv
    2003.09971). The encoder runs without drop path."""

    samples: int = 1
    baseline: str = "greedy"
    max_words: int = 20  # ids, counting EOS but not BOS
    name = "masked"
    first_pass = False

    def __post_init__(self) -> None:
        if self.baseline not in BASELINES:
            raise ValueError(f"masked.baseline={self.baseline!r} is unknown; use {' or '.join(BASELINES)}")
        least = 2 if self.baseline == "mean" else 1
        if self.samples < least:
            raise ValueError(f"masked.samples={self.samples} is below {least}, which baseline={self.baseline} needs")
        if self.max_words < 1:
            raise ValueError(f"masked.max_words={self.max_words} is below 1; use 20")

    @property
    def draws(self) -> int:
        return self.samples * self.max_words

    def build(self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: Any = None) -> nn.Module:
        return SelfCriticalHead(self, layers.classifier(model.width("pair_texts"), model.vocab_size))

    def join(self, head: SelfCriticalHead, heads: Mapping[str, nn.Module]) -> None:
        head.encoder = (heads["encoder"],)

    def prepare(self, head: SelfCriticalHead, stage: Any, tokenizer: Callable[[], Any]) -> None:
        if any(hasattr(parameter, "ds_id") for parameter in head.parameters()):
            raise ValueError(
                "CIDEr optimisation does not go with ZeRO-3; use ds_configs/zero2.json, zero1.json or zero0"
            )
        head.tokenizer, head.known = tokenizer(), Frequencies.read(stage.mix["pairs"].frequencies)

    def problems(self, stage: Any) -> list[str]:
        problems = []
        if not hasattr(stage.mix.get("pairs"), "frequencies"):
            problems.append("CIDEr optimisation needs captions to compare with; give the mix pairs=RewardShards(...)")
        if stage.parallel.model > 1:
            problems.append(
                f"CIDEr optimisation does not go with parallel.tensor={stage.parallel.tensor}, "
                f"parallel.pipe={stage.parallel.pipe}, parallel.sequence={stage.parallel.sequence}; set them to 1"
            )
        return problems

    def passes(self, layout: Layout) -> list[Pass]:
        """An upper bound: two rows for each word, its own and that of its <mask>, and texts of full length."""
        length, drawn = 2 * self.max_words, layout.pairs * self.samples
        written = drawn + layout.pairs * (self.baseline == "greedy")
        plain = Layout(pairs=written, patches=layout.patches, pair_len=length, causal=True)
        return [Pass(plain, backward=False), Pass(replace(plain, pairs=drawn))]

    def products(self, layout: Layout, model: Any) -> list[Product]:
        rows = layout.pairs * self.samples * self.max_words
        return [Product(rows, model.width("pair_texts"), model.vocab_size, classes=True)]


class SelfCriticalHead(nn.Module):
    """A linear head over the vocabulary. `encoder`, `tokenizer` and `known` are set by SelfCritical's `join` and
    `prepare`."""

    encoder: tuple[Any]  # in a tuple, so that it is not a submodule
    tokenizer: Any
    known: Frequencies  # CIDEr's document frequencies

    def __init__(self, how: SelfCritical, text: Any):
        super().__init__()
        self.how, self.text = how, text

    def needed_rows(self, batch: Batch) -> Kinds:
        """No row of the first pass."""
        return Kinds.rows_of(batch.layout, batch.images.device)

    def forward(self, encoded: Kinds, batch: Batch, encode: Encoder | None = None) -> dict[str, Tensor]:
        """-> `loss`, the mean over the drawn texts of -(CIDEr-D - baseline) * log-probability, and the scores of the
        drawn texts and of the baseline, in percent."""
        layout, samples = batch.layout, self.how.samples
        images = batch.images[layout.images :]
        longest = min(self.how.max_words, layout.pair_len - 1)
        drawn = batch.draws[SelfCritical.name][layout.images : layout.images + layout.pairs]
        drawn = drawn.view(len(images) * samples, self.how.max_words)[:, :longest]
        with torch.no_grad():
            ids = self._write(batch, Writing(beams=1, top_p=1.0, max_words=longest), drawn)
            rewards = self._rewards(ids, batch, samples)
            if self.how.baseline == "greedy":
                likely = self._write(batch, Writing(beams=1, max_words=longest), None)
                baseline = self._rewards(likely, batch, 1)
            else:
                baseline = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
        chances = self.log_probabilities(batch, ids).view_as(rewards)
        loss = -((rewards - baseline) * chances).mean()
        return {"loss": loss, "CIDEr/drawn": 100 * rewards.mean(), "CIDEr/baseline": 100 * baseline.mean()}

    def _reader(self, batch: Batch, width: int, longest: int) -> NextWord:
        """Reads `width` texts of at most `longest` words behind each picture."""
        images = batch.images[batch.layout.images :]
        reader = text_reader(self.encoder[0], images, batch.layout.patches, longest + 1)
        places = torch.arange(len(images), device=images.device).repeat_interleave(width)
        reader.choose(places, width)
        mask_id = self.tokenizer.mask_id
        return NextWord(reader, self.text.logits, mask_id, mask_id)

    def _write(self, batch: Batch, how: Writing, drawn: Tensor | None) -> Tensor:
        """Texts int64 [pairs * width, length], those of a picture together: the most likely one of each picture
        (`drawn` None, width 1), or `samples` of each by the uniform numbers `drawn` [pairs * width, max_words]."""
        width = 1 if drawn is None else self.how.samples
        next_word = self._reader(batch, width, how.max_words)
        return write(next_word, batch.layout.pairs * width, how, drawn, batch.images.device)

    def log_probabilities(self, batch: Batch, ids: Tensor) -> Tensor:
        """The log-probability of each whole text in `ids`, fp32 [pairs * samples], with gradient."""
        next_word, total = self._reader(batch, self.how.samples, ids.shape[1] - 1), []
        for place in range(ids.shape[1] - 1):
            # Normalised over the ids that may be written, as when words are drawn.
            scores = next_word(ids[:, place : place + 1]).log_softmax(-1)
            word = ids[:, place + 1]
            own = scores.gather(1, word.where(word != PAD, EOS)[:, None]).squeeze(1)
            total.append(own.where(word != PAD, 0.0))
        return torch.stack(total).sum(0)

    def _rewards(self, ids: Tensor, batch: Batch, width: int) -> Tensor:
        """float32 [pairs, width]: each text's CIDEr-D, in which its end counts as a word; about 1 for a caption as
        people write them."""
        texts = [self.tokenizer.decode(row) for row in ids.tolist()]
        references = [given for given in batch.extra[REFERENCES] for _ in range(width)]
        ended = (ids == EOS).any(1).tolist()
        return torch.tensor(cider(texts, references, self.known, ended), device=ids.device).view(-1, width)

    def after_step(self) -> None:
        """Nothing moves between steps."""
