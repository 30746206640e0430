"""Mixup (arXiv 1710.09412) and CutMix (1905.04899) of labelled pictures, as in timm's Mixup with mode "pair".

The places 2 i and 2 i + 1 of a global batch are partners, and each is blended with the other by one share, which the
generator of the first of them draws. If every micro-step has an even number of pictures, the batch does not depend on
the number of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

LABEL = "label"
OTHER, SHARE = "other_label", "label_share"  # in a batch's extra: the partner's label, and the weight of the own one


@dataclass(frozen=True)
class Mixing:
    """`mixup` and `cutmix`: the alphas of the Beta distributions of the shares, 0 for never. A pair is blended with the
    probability `probability`; if both are set, by CutMix with the probability `switch`, else by Mixup. The defaults are
    unilm's for ImageNet (get_started_for_image_classification.md: 0.8 and 1.0; run_beit3_finetuning.py: probabilities
    1.0 and 0.5)."""

    mixup: float = 0.8
    cutmix: float = 1.0
    probability: float = 1.0
    switch: float = 0.5

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"mixing.{name}={value} must be a number of at least 0; 0 switches it off")
        if not self.mixup and not self.cutmix:
            raise ValueError("mixing.mixup=0 and mixing.cutmix=0 mix nothing; leave mixing out")
        for name in ("probability", "switch"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"mixing.{name}={getattr(self, name)} is not a probability; use 0 to 1")

    def blend(self, first: np.ndarray, second: np.ndarray, rng: Generator) -> float:
        """Blends two pictures, uint8 [3, size, size], in place -> the weight of its own label for each."""
        mix, cut = rng.random(2).tolist()
        if mix >= self.probability:
            return 1.0
        cuts = bool(self.cutmix) and (not self.mixup or cut < self.switch)
        alpha = self.cutmix if cuts else self.mixup
        share = float(rng.beta(alpha, alpha))
        if cuts:
            return _swap_box(first, second, share, rng)
        one, other = first.astype(np.float32), second.astype(np.float32)
        for place, own, partner in ((first, one, other), (second, other, one)):
            np.copyto(place, np.rint(share * own + (1 - share) * partner), casting="unsafe")
        return share


def _swap_box(first: np.ndarray, second: np.ndarray, share: float, rng: Generator) -> float:
    """Exchanges a box of the area 1 - share around a random point, cut off at the edges (CutMix, section 3.1) -> the
    share of the area that is really left, which counts as in timm."""
    height, width = first.shape[1:]
    ratio = math.sqrt(1 - share)
    cut_h, cut_w = int(height * ratio), int(width * ratio)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    rows = slice(max(y - cut_h // 2, 0), min(y + cut_h // 2, height))
    columns = slice(max(x - cut_w // 2, 0), min(x + cut_w // 2, width))
    box = first[:, rows, columns].copy()
    first[:, rows, columns] = second[:, rows, columns]
    second[:, rows, columns] = box
    return 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)
