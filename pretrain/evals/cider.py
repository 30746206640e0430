"""CIDEr-D, by which captions are compared with what people wrote (Vedantam et al., arXiv 1411.5726, 3 and 6), as
pycocoevalcap computes it: term frequencies of one to four words, weighed by how rare they are among the references,
their clipped cosine, and a Gaussian of the difference of lengths; times ten. Without Java: words are what is left of a
text in small letters without punctuation, where pycocoevalcap calls Stanford's tokenizer, so texts whose words are
joined by punctuation differ."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

LONGEST, SIGMA = 4, 6.0
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
Counts = Counter[tuple[str, ...]]


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The score of each caption against its own references, from 0 to 10. With a single picture every word is as rare
    as any, and all scores are 0."""
    if len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions and {len(references)} lists of references; give one to each")
    own = [_counts(words_of(text)) for text in captions]
    given = [[_counts(words_of(text)) for text in texts] for texts in references]
    frequency: Counts = Counter(gram for texts in given for gram in set().union(*texts))
    rarity = math.log(len(given))

    def weighed(counts: Counts) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (rarity - math.log(max(frequency[gram], 1)))
        norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
        # Its length counts pairs of words, as there.
        return vectors, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = []
    for caption, texts in zip(map(weighed, own), given, strict=True):
        each = [_similarity(caption, weighed(text)) for text in texts]
        scores.append(10 * sum(each) / len(each))
    return scores


def _similarity(ours: tuple, theirs: tuple) -> float:
    total = 0.0
    for a, b, norm_a, norm_b in zip(ours[0], theirs[0], ours[1], theirs[1], strict=True):
        product = sum(min(value, b[gram]) * b[gram] for gram, value in a.items() if gram in b)
        if norm_a and norm_b:
            product /= norm_a * norm_b
        total += product * math.exp(-((ours[2] - theirs[2]) ** 2) / (2 * SIGMA**2))
    return total / LONGEST


def _counts(words: list[str]) -> Counts:
    grams = (tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1))
    return Counter(grams)
