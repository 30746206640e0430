"""What is hidden from the encoder: block-wise image masks, and text masks by BERT's 80/10/10 rule.

Ratios are BEiT-3's (arXiv 2208.10442, part 2.2): 40 % of an image, 15 % of a text alone, 50 % of a pair's text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from pretrain.batch import EOS, UNK

# BEiT v2's generator at 14 x 14: blocks of at least 16 patches, sides in a ratio of 0.3 to 1 / 0.3, ten tries a block.
MIN_BLOCK, ON_PATCHES = 16, 196
ASPECT = (0.3, 1 / 0.3)
TRIES = 10
# The shares of the chosen words that become <mask> and a random word; the rest stay as they are (BERT, part 3.1).
SHARE_MASKED, SHARE_RANDOM = 0.8, 0.1
RATIOS = ("image_ratio", "text_ratio", "pair_text_ratio", "pair_image_ratio")


@dataclass(frozen=True)
class Masking:
    """The share of each modality that is hidden; 0 turns that mask off.

    Whether BEiT-3 masks image and text of a pair at once was not published; `pair_image_ratio` decides.
    """

    image_ratio: float = 0.4
    text_ratio: float = 0.15
    pair_text_ratio: float = 0.5
    pair_image_ratio: float = 0.4
    dual: bool = True  # mask dual pairs like images and texts; False: leave them whole for a contrastive objective
    # EOS is chosen like a word. A model that never predicts it cannot end a text, so captioning needs this (unilm's
    # CaptioningDataset does so); whether BEiT-3's pretraining did was not published.
    mask_eos: bool = False

    def __post_init__(self) -> None:
        for name in RATIOS:
            if not 0 <= (ratio := getattr(self, name)) <= 1:
                raise ValueError(
                    f"masking.{name}={ratio} is wrong because a ratio lies in [0, 1]; use 0 to mask nothing"
                )

    def ratios(self, kind: str) -> tuple[float, float]:
        """(image's, text's) ratio for one kind of a mix: images, pairs, texts or dual."""
        if kind == "pairs":
            return self.pair_image_ratio, self.pair_text_ratio
        if kind == "dual" and not self.dual:
            return 0.0, 0.0
        return (0.0 if kind == "texts" else self.image_ratio), (0.0 if kind == "images" else self.text_ratio)


def combine(maskings: Sequence[Masking]) -> Masking | None:
    """The masking for several objectives: for each modality the largest ratio among theirs; None without any."""
    if len(maskings) < 2:
        return maskings[0] if maskings else None
    ratios = {name: max(getattr(masking, name) for masking in maskings) for name in RATIOS}
    either = {name: any(getattr(masking, name) for masking in maskings) for name in ("dual", "mask_eos")}
    return Masking(**ratios, **either)


def mask_image(grid: int, ratio: float, rng: Generator) -> np.ndarray:
    """bool [grid * grid] in raster order, True where hidden: rectangles while they fit, then single patches, so that
    the count is exact: round(ratio * patches), at least one."""
    mask = np.zeros((grid, grid), dtype=bool)
    remaining = target = count_masked(grid * grid, ratio)
    least = max(1, round(MIN_BLOCK * grid * grid / ON_PATCHES))
    while remaining > 0:
        new = _add_block(mask, remaining, least, rng)
        if new == 0:
            break
        remaining -= new
    flat = mask.reshape(-1)
    if remaining:
        flat[rng.choice(np.flatnonzero(~flat), remaining, replace=False)] = True
    assert np.count_nonzero(flat) == target
    return flat


def count_masked(patches: int, ratio: float) -> int:
    """How many of an image's patches `mask_image` hides."""
    return min(patches, max(1, round(patches * ratio))) if ratio else 0


def _add_block(mask: np.ndarray, room: int, least: int, rng: Generator) -> int:
    """Hides one rectangle that adds at most `room` patches; returns how many it added, 0 when no try fits."""
    grid = mask.shape[0]
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    for area, aspect, y, x in rng.random((TRIES, 4)).tolist():
        area = least + area * (room - least)
        aspect = math.exp(low + aspect * (high - low))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if not (0 < h < grid and 0 < w < grid):
            continue
        top, left = int(y * (grid - h + 1)), int(x * (grid - w + 1))
        block = mask[top : top + h, left : left + w]
        new = h * w - int(np.count_nonzero(block))
        if 0 < new <= room:
            block[:] = True
            return new
    return 0


def mask_text(
    ids: np.ndarray, ratio: float, *, mask_id: int, rng: Generator, mask_eos: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(inputs int64 [L], masked bool [L]) of one text's ids int64 [L].

    Special ids (BOS, PAD, EOS, UNK, <mask>) are never chosen, and never inserted as random words; with `mask_eos` EOS
    is chosen like a word. A text with at least one such id has a target; random rounding keeps the ratio of short texts
    right on average.
    """
    inputs, masked = ids.copy(), np.zeros(len(ids), dtype=bool)
    real = np.flatnonzero((ids > UNK) & (ids < mask_id) | (mask_eos & (ids == EOS)))
    if not ratio or not len(real):
        return inputs, masked
    count = min(len(real), max(1, int(len(real) * ratio + rng.random())))
    chosen = rng.choice(real, count, replace=False)
    masked[chosen] = True
    fate, words = rng.random(count), rng.integers(UNK + 1, mask_id, count)
    replaced = np.where(fate < SHARE_MASKED + SHARE_RANDOM, words, ids[chosen])
    inputs[chosen] = np.where(fate < SHARE_MASKED, mask_id, replaced)
    return inputs, masked
