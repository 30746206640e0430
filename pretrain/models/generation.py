"""Texts that a causal language model writes behind pictures: greedy, by beams, or drawn (nucleus sampling).

Beam search is that of transformers (generation/utils.py, 5.23: `_beam_search`, early_stopping=False), and so are its
numbers. Nucleus sampling: Holtzman et al., arXiv 1904.09751, 3.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import BOS, EOS, PAD, UNK, Layout, make_batch

NEVER = -1e9  # the score of what must not be chosen


@dataclass(frozen=True)
class Writing:
    """How a text is chosen. `beams` 1 is greedy. `top_p` above 0 draws each word from the smallest set of most likely
    words whose probabilities add up to it. `length_penalty`: a beam's score is its log-probability / words **
    length_penalty. The defaults are those of BEiT-3's caption evaluation (unilm, beit3/run_beit3_finetuning.py)."""

    beams: int = 3
    length_penalty: float = 0.6
    top_p: float = 0.0
    temperature: float = 1.0  # of the drawing
    max_words: int = 32  # ids, counting EOS but not BOS

    def __post_init__(self) -> None:
        if self.beams < 1 or self.max_words < 1:
            raise ValueError(f"beams={self.beams} and max_words={self.max_words} must be 1 or more; use 3 and 32")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is no share; use 0 for the most likely text, or 0.9 to draw one")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be above 0; use 1")
        if self.top_p and self.beams > 1:
            raise ValueError(f"top_p={self.top_p} draws one text, and beams={self.beams} keeps several; use beams=1")


class WholePass:
    """Reads texts by a whole causal pass for each word, with any encoder: the plain way, whose numbers CausalText
    must equal."""

    def __init__(self, encoder: Any, images: Tensor, patches: int):
        self.encoder, self.images, self.patches = encoder, images, patches
        self.words = torch.zeros(len(images), 0, dtype=torch.long, device=images.device)
        self.width = 1

    def read(self, ids: Tensor, keep: int | None = None) -> Tensor:
        """See CausalText.read."""
        whole = torch.cat([self.words, ids], 1)
        self.words = torch.cat([self.words, ids[:, :keep]], 1)
        layout = Layout(pairs=len(ids), patches=self.patches, pair_len=whole.shape[1], causal=True)
        images = self.images.repeat_interleave(self.width, 0)
        rows = self.encoder(make_batch(layout, images=images, pair_tokens=whole)).pair_texts
        return rows[:, -ids.shape[1] :]

    def choose(self, places: Tensor, width: int) -> None:
        """See CausalText.choose."""
        self.words, self.width = self.words.index_select(0, places), width


def text_reader(encoder: Any, images: Tensor, patches: int, longest: int) -> Any:
    """The encoder's own reader of texts behind these pictures, which caches keys and values, if it has one; else a
    WholePass. `longest`: ids of a text, with BOS."""
    if hasattr(encoder, "causal_text"):
        return encoder.causal_text(images, longest)
    return WholePass(encoder, images, patches)


class NextWord:
    """The log-probabilities of the next word of each text. `text` is a CausalText or a WholePass, `logits` the head;
    ids from `words` on are not words. With `mask_id` None the last word's row predicts the next one (objective
    captioning). Else a <mask> is put where the next word will stand, and its row predicts the word (BEiT-3: unilm
    beit3/engine_for_finetuning.py, CaptioningHandler)."""

    def __init__(self, text: Any, logits: Callable[[Tensor], Tensor], words: int, mask_id: int | None = None):
        self.text, self.logits, self.words, self.mask_id = text, logits, words, mask_id

    def __call__(self, ids: Tensor) -> Tensor:
        """The words since the last call, int64 [n, L] -> float32 [n, vocab_size]."""
        length = ids.shape[1]
        if self.mask_id is not None:
            ids = torch.cat([ids, ids.new_full((len(ids), 1), self.mask_id)], 1)
        rows = self.text.read(ids, keep=length)
        scores = self.logits(rows[:, -1]).float().log_softmax(-1)
        return scores + never_written(scores.shape[1], self.words, scores.device)

    def choose(self, places: Tensor, width: int) -> None:
        self.text.choose(places, width)


def next_word_head(objectives: Any, mask_id: int) -> tuple[Callable[[Tensor], Tensor], int | None] | None:
    """The head among a stage's objectives that can write texts -> (its logits, the `mask_id` of NextWord); None if
    there is no such head."""
    if "captioning" in objectives:
        return objectives["captioning"].logits, None
    if "masked" in objectives and objectives["masked"].words is not None:
        return objectives["masked"].words.logits, mask_id
    return None


def never_written(vocab_size: int, words: int, device: torch.device) -> Tensor:
    """float32 [vocab_size]: -inf for ids that are not words (the specials except EOS, and the ids from `words` on:
    <mask> and unused ones), else 0."""
    never = torch.zeros(vocab_size, device=device)
    never[[BOS, PAD, UNK]] = -torch.inf
    never[words:] = -torch.inf
    return never


def write(next_word: Callable[[Tensor], Tensor], count: int, how: Writing, draws: Tensor | None, device: Any) -> Tensor:
    """`count` texts, int64 [count, length]: BOS, words, EOS (absent if `max_words` cut the text), PAD. `draws`: uniform
    random numbers [count, max_words], for top_p."""
    start = torch.full((count, 1), BOS, dtype=torch.long, device=device)
    if not count:
        return start
    if how.top_p or how.beams == 1:
        return _one_by_one(next_word, start, how, draws)
    return _by_beams(next_word, start, how)


def _one_by_one(next_word: Callable[[Tensor], Tensor], ids: Tensor, how: Writing, draws: Tensor | None) -> Tensor:
    ended, new = torch.zeros(len(ids), dtype=torch.bool, device=ids.device), ids
    for number in range(how.max_words):
        scores = next_word(new)
        if how.top_p:
            assert draws is not None
            chosen = _draw(scores / how.temperature, how.top_p, draws[:, number].to(ids.device))
        else:
            chosen = scores.argmax(-1)
        chosen = torch.where(ended, PAD, chosen)
        new, ended = chosen.unsqueeze(1), ended | (chosen == EOS)
        ids = torch.cat([ids, new], 1)
        if ended.all():
            break
    return ids


def _draw(scores: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """int64 [n]: for each row of `scores` [n, V] a word of its nucleus, the smallest set of most likely words with a
    total probability of at least `top_p`. `uniform` [n] in [0, 1)."""
    shares, order = scores.softmax(-1).double().sort(dim=-1, descending=True, stable=True)
    before = shares.cumsum(-1) - shares
    nucleus = torch.where(before < top_p, shares, 0).cumsum(-1)
    place = (nucleus <= uniform.double().unsqueeze(1) * nucleus[:, -1:]).sum(-1).clamp(max=shares.shape[1] - 1)
    return order.gather(1, place.unsqueeze(1)).squeeze(1)


def _by_beams(next_word: Any, start: Tensor, how: Writing) -> Tensor:
    count, beams = len(start), how.beams
    running = start.unsqueeze(1).expand(-1, beams, -1)  # [count, beams, length], best first
    scores = torch.full((count, beams), NEVER, device=start.device)
    scores[:, 0] = 0  # the beams are equal at first: only one of them goes on
    done = start.new_full((count, beams, how.max_words + 1), PAD)
    done_scores = torch.full_like(scores, NEVER)
    better = torch.ones(count, 1, dtype=torch.bool, device=start.device)  # whether a running beam could still win
    first = torch.arange(count, device=start.device).unsqueeze(1)
    logs = next_word(start).repeat_interleave(beams, 0)
    places = first  # where each beam's parent stands among the texts that were read
    for length in range(1, how.max_words + 1):
        if length > 1:
            next_word.choose(places.flatten(), beams)
            logs = next_word(running[:, :, -1:].flatten(0, 1))
        vocabulary = logs.shape[1]
        both, chosen = (logs.unflatten(0, (count, beams)) + scores.unsqueeze(2)).flatten(1).topk(2 * beams)
        parent, word = chosen // vocabulary, chosen % vocabulary
        grown = torch.cat([_of(running, parent), word.unsqueeze(2)], 2)
        ended = (word == EOS) | (length == how.max_words)
        # Only the best `beams` candidates may end; the others are there so that as many beams can go on.
        ends = ended & (torch.arange(2 * beams, device=start.device) < beams)
        final = both / length**how.length_penalty + NEVER * (~ends | ~better)
        padded = torch.nn.functional.pad(grown, (0, how.max_words - length), value=PAD)
        done_scores, best = torch.cat([done_scores, final], 1).topk(beams)
        done = _of(torch.cat([done, padded], 1), best)
        scores, best = (both + NEVER * ended).topk(beams)
        running, parent = _of(grown, best), parent.gather(1, best)
        places = first * beams + parent if length > 1 else first.expand(-1, beams)
        filled = done_scores > NEVER / 2
        worst = torch.where(filled, done_scores.min(1, keepdim=True).values, NEVER)
        better = better & (scores[:, :1] / length**how.length_penalty > worst).any(1, keepdim=True)
        if not better.any():
            break
    return done[:, 0]


def _of(beams: Tensor, places: Tensor) -> Tensor:
    """The beams at `places`: [count, m, length], int64 [count, n] -> [count, n, length]."""
    return beams.gather(1, places.unsqueeze(2).expand(-1, -1, beams.shape[2]))
