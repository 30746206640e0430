"""Random deletion and synonym replacement of words, as in EDA (arXiv 1901.11196, section 2), whose rates are 0.1 for
texts as short as captions. The sample's own generator decides, anew in each epoch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.random import Generator, Philox

from pretrain.json_files import parse_json, read_bytes
from pretrain.settings import fill_variables

MAX_BYTES = 2**28
OWN_STREAM = np.array([0, 1 << 63], np.uint64)
WORD = re.compile(r"\S+")
EDGES = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)  # a word, and the punctuation before and behind it


@dataclass(frozen=True)
class TextNoise:
    """`drop`: the share of words that are left out, though never all of a text. `replace`: the share, of the words in
    `synonyms`, that are replaced by one of their synonyms. `synonyms`: a JSON file of {word in lower case: [words]}. A
    noise of your own is a dataclass with `__call__` and `files`."""

    drop: float = 0.1
    replace: float = 0.0
    synonyms: str = ""

    def __post_init__(self) -> None:
        for name in ("drop", "replace"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"noise.{name}={getattr(self, name)} is not a share; use at least 0, less than 1")
        if bool(self.replace) != bool(self.synonyms):
            raise ValueError(
                f"noise.replace={self.replace} does not go with noise.synonyms={self.synonyms!r}; set both or none"
            )

    @property
    def files(self) -> tuple[str, ...]:
        return (self.synonyms,) if self.synonyms else ()

    def __call__(self, text: str, rng: Generator) -> str:
        words = WORD.findall(text)
        # Three numbers a word, used or not: what one word becomes changes no other.
        draws = _own(rng).random((len(words), 3)).tolist()
        known = read_synonyms(self.synonyms) if self.synonyms else {}
        remaining = []
        for word, (drop, replace, which) in zip(words, draws, strict=True):
            if drop < self.drop:
                continue
            before, inner, after = EDGES.match(word).groups()  # type: ignore[union-attr]  # it matches anything
            others = known.get(inner.lower(), ())
            if others and replace < self.replace:
                word = before + others[int(which * len(others))] + after
            remaining.append(word)
        if not remaining and words:
            remaining = [words[min(range(len(words)), key=lambda place: -draws[place][0])]]
        return " ".join(remaining)


def _own(rng: Generator) -> Generator:
    """A generator beside the sample's, which goes on as it would without noise, so that the crop of its picture stays
    the one whose codes are stored. OWN_STREAM cannot collide with the kinds' streams, which are small numbers
    (transforms.sample_rng)."""
    state = rng.bit_generator.state["state"]
    return Generator(Philox(key=state["key"] ^ OWN_STREAM, counter=state["counter"]))


def noisy(text: str, noise: TextNoise | None, rng: Generator) -> str:
    """The text under the noise; None changes nothing."""
    return text if noise is None else noise(text, rng)


def files_of(noise: TextNoise | None) -> tuple[str, ...]:
    """The files that the noise reads; None reads none."""
    return () if noise is None else noise.files


def read_synonyms(name: str) -> dict[str, tuple[str, ...]]:
    """{word in lower case: its synonyms} from a JSON file. ValueError if it is missing or of another kind."""
    return _read(Path(fill_variables(name, "noise.synonyms")).expanduser())


@lru_cache(maxsize=4)
def _read(path: Path) -> dict[str, tuple[str, ...]]:
    try:
        content = parse_json(read_bytes(path, MAX_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"noise.synonyms={path} cannot be read ({error}); give a JSON of word: [words]") from None
    if not isinstance(content, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) and word.strip() for word in words)
        for words in content.values()
    ):
        raise ValueError(f"noise.synonyms={path} is no JSON of word: [words]; write it so")
    return {word.lower(): tuple(words) for word, words in content.items() if words}
