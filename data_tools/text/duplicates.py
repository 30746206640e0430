"""Documents that were seen before: exactly (but for case, punctuation and blanks), or nearly, by MinHash and LSH.

Nearly: the sets of runs of five words have an estimated Jaccard similarity of at least `near`. The first document in
the order of the input stays. Measured memory per million kept documents: 145 MiB for exact duplicates alone, 2.2 GiB
with near ones, 3.5 GiB with `near` below 0.78, where twice as many bands are needed.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b
from typing import Any

RUN = 5  # words, as in arXiv 2107.06499 and its followers
SAMPLES = 128  # of the MinHash: an estimate is off by 0.035 (one standard deviation) at a similarity of 0.8
SEED = 1
# Pairs at the threshold itself that the bands must find; the estimate then decides.
RECALL = 0.9
HOW_TO_INSTALL = "pip install rensa, or pip install '.[prepare]' in the checkout; or take --near 1 for exact ones alone"
_WORD = re.compile(r"\w+")


def comparable(text: str) -> list[str]:
    """The words that are compared: without case, punctuation and differences of Unicode's compatible forms."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def digest(words: list[str], text: str) -> bytes:
    """16 bytes, equal for texts of equal words. `text` stands in where there are no words at all."""
    return blake2b((" ".join(words) or text).encode("utf-8", "replace"), digest_size=16).digest()


def runs(words: list[str]) -> list[str]:
    """Every run of five words; of a shorter text, all of it."""
    return [" ".join(words[i : i + RUN]) for i in range(max(len(words) - RUN + 1, 1))]


def signature(words: list[str]) -> bytes:
    """The MinHash of a text, as bytes that `SeenTexts` reads."""
    sketch = _rensa().RMinHash(num_perm=SAMPLES, seed=SEED)
    sketch.update(runs(words))
    return sketch.__getstate__()


def bands(near: float) -> int:
    """How many bands the samples are cut in: as few, and so as selective and small, as find RECALL of the pairs at
    the threshold."""
    for count in (4, 8, 16, 32, 64):
        if 1 - (1 - near ** (SAMPLES // count)) ** count >= RECALL:
            return count
    return SAMPLES


def check_near(near: float) -> None:
    """Raises ValueError for a threshold that means nothing, or that needs a package which is not there."""
    if not 0.3 <= near <= 1:
        raise ValueError(f"--near={near} is not between 0.3 and 1; use 0.8, or 1 for exact duplicates alone")
    if near < 1:
        _rensa()


def _rensa() -> Any:
    try:
        import rensa
    except ImportError:
        raise ValueError(f"rensa, which finds near duplicates, is not installed; {HOW_TO_INSTALL}") from None
    return rensa


class SeenTexts:
    """What was kept so far. A text that is dropped is not remembered: only kept ones have duplicates."""

    def __init__(self, near: float):
        check_near(near)
        self._exact: dict[bytes, int] = {}
        self._near: Any = None
        if near < 1:
            self._near = _rensa().RMinHashDeduplicator(
                threshold=near, num_perm=SAMPLES, use_lsh=True, num_bands=bands(near), seed=SEED
            )

    def add(self, number: int, digest: bytes, signature: bytes) -> tuple[str, int] | None:
        """Keeps the text under this number, or says (reason, the number of the earlier one that it repeats)."""
        if (earlier := self._exact.get(digest)) is not None:
            return "duplicate", earlier
        if self._near is not None:
            sketch = _rensa().RMinHash(num_perm=SAMPLES, seed=SEED)
            sketch.__setstate__(signature)
            if not self._near.add(str(number), sketch):
                return "near_duplicate", min(map(int, self._near.get_duplicates(sketch)))
        self._exact[digest] = number
        return None
