"""CIDEr-D, which compares captions with those of people (Vedantam et al., arXiv 1411.5726, 3 and 6), as pycocoevalcap
computes it: term frequencies of one to four words, weighted by how rare they are among the references, their clipped
cosine, and a Gaussian of the difference of lengths; times ten. It needs no Java: words are split by a regular
expression, where pycocoevalcap calls Stanford's tokenizer, so that scores differ for words joined by punctuation."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pretrain.files import write_json
from pretrain.json_files import read_object
from pretrain.settings import fill_variables

LONGEST, SIGMA = 4, 6.0
END = "</s>"  # the end of a text, where it counts as a word
MAX_BYTES = 2**30  # of a file of frequencies; COCO's training captions make about 30 MB
_WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
Counts = Counter[tuple[str, ...]]


def words_of(text: str) -> list[str]:
    """A text's words in lower case, without punctuation."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Frequencies:
    """Document frequencies: for each n-gram of one to four words, the end among them, in the references of how many of
    `pictures` it occurs. An n-gram that is not listed counts as occurring with one picture, as in pycocoevalcap."""

    pictures: int
    grams: dict[tuple[str, ...], int]

    @classmethod
    def of(cls, references: Iterable[Sequence[str]]) -> Frequencies:
        """From the references of each picture; n-grams that occur with a single picture are left out."""
        counts, pictures = Counts(), 0
        for texts in references:
            counts.update(set().union(*(_counts([*words_of(text), END]) for text in texts)))
            pictures += 1
        return cls(pictures, {gram: count for gram, count in counts.items() if count > 1})

    def rarity(self, gram: tuple[str, ...]) -> float:
        """The inverse document frequency, as a logarithm."""
        return math.log(self.pictures) - math.log(self.grams.get(gram, 1))

    def write(self, path: Path) -> None:
        """Writes them as JSON, the most frequent first."""
        often = sorted((-count, " ".join(gram)) for gram, count in self.grams.items())
        write_json(path, {"pictures": self.pictures, "grams": {gram: -count for count, gram in often}})

    @classmethod
    def read(cls, name: str) -> Frequencies:
        """Reads the file `name`, in which $VARIABLES are expanded. ValueError if it is missing or of another kind."""
        return _read(Path(fill_variables(name, "frequencies")).expanduser())


@lru_cache(maxsize=2)
def _read(path: Path) -> Frequencies:
    way_out = "write it with python -m data_tools.caption_frequencies"
    if not path.is_file():
        raise ValueError(f"frequencies={path} does not exist; {way_out}")
    content = read_object(path, MAX_BYTES)
    pictures, grams = content.get("pictures"), content.get("grams")
    if (
        not isinstance(pictures, int)
        or not _is_count(pictures)
        or not isinstance(grams, dict)
        or not all(map(_is_count, grams.values()))
    ):
        raise ValueError(f"frequencies={path} has no number of pictures and counts of grams; {way_out}")
    return Frequencies(pictures, {tuple(gram.split(" ")): count for gram, count in grams.items()})


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def cider(
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    known: Frequencies | None = None,
    ended: Sequence[bool] | None = None,
) -> list[float]:
    """The score of each caption against its own references, from 0 to 10. `known`: document frequencies; by default
    those of these references, by which all scores are 0 if there is a single picture. `ended`, for rewards: the end
    counts as a word, which all references have, and the captions for which this is True. Without it, stopping in the
    middle of a phrase would be rewarded (Hu et al., arXiv 2305.12254)."""
    if len(captions) != len(references) or not all(references):
        raise ValueError(f"{len(captions)} captions and {len(references)} lists of references; give one to each")
    end, ends = [] if ended is None else [END], ended or [False] * len(captions)
    own = [_counts(words_of(text) + [END] * end) for text, end in zip(captions, ends, strict=True)]
    given = [[_counts(words_of(text) + end) for text in texts] for texts in references]
    rarity = (known or Frequencies.of(references)).rarity

    def weighed(counts: Counts) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(LONGEST)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * rarity(gram)
        norms = [math.sqrt(sum(value**2 for value in vector.values())) for vector in vectors]
        # As in pycocoevalcap, the length is the number of bigrams.
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
