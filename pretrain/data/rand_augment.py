"""RandAugment (arXiv 1909.13719) as BEiT-3 is fine-tuned with it (unilm beit3/randaug.py and datasets.py: two of ten
operations, each with the probability 1/2, at strength 7 of 10). Pictures are uint8 [size, size, 3], RGB.

Look-up tables equal Pillow's ImageOps and ImageEnhance to the digit; geometric operations are bilinear and fill with
grey.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator

MOST = 10.0  # the highest strength
GREY = (128, 128, 128)
SHEAR, SHIFT, TURN = 0.3, 10.0, 30.0  # share of a side, pixels, degrees, at the highest strength
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13  # Pillow's ImageFilter.SMOOTH


def autocontrast(pixels: np.ndarray) -> np.ndarray:
    """Stretches each channel to 0 to 255, as Pillow's ImageOps.autocontrast."""
    return cv2.merge([cv2.LUT(plane, _stretched(plane)) for plane in cv2.split(pixels)])


def _stretched(plane: np.ndarray) -> np.ndarray:
    """The lookup table of 256 values that stretches a channel."""
    low, high = int(plane.min()), int(plane.max())
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255.0 / (high - low)
    return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)


def equalize(pixels: np.ndarray) -> np.ndarray:
    """Levels the histogram of each channel, as Pillow's ImageOps.equalize."""
    return cv2.merge([cv2.LUT(plane, _levelled(plane)) for plane in cv2.split(pixels)])


def _levelled(plane: np.ndarray) -> np.ndarray:
    """The lookup table of 256 values that levels a channel's histogram."""
    counts = np.bincount(plane.reshape(-1), minlength=256)
    step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
    if step == 0:
        return np.arange(256, dtype=np.uint8)
    before = np.cumsum(counts) - counts
    return ((step // 2 + before) // step).clip(0, 255).astype(np.uint8)


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies all values by `factor`; 1 changes nothing."""
    return cv2.LUT(pixels, (np.arange(256, dtype=np.float32) * factor).clip(0, 255).astype(np.uint8))


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
    """The pixels at the edge stay, as in Pillow."""
    smooth = cv2.filter2D(pixels, -1, SMOOTH)[1:-1, 1:-1].astype(np.float32)
    out = pixels.copy()
    out[1:-1, 1:-1] = (smooth + factor * (pixels[1:-1, 1:-1] - smooth)).clip(0, 255).astype(np.uint8)
    return out


def rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
    """Counter-clockwise, around the centre."""
    height, width = pixels.shape[:2]
    return _moved(pixels, cv2.getRotationMatrix2D((width / 2, height / 2), degrees, 1))


def shear(pixels: np.ndarray, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """Moves row number n to the right by `x` * n pixels, and column number n down by `y` * n pixels."""
    return _moved(pixels, np.array([[1, x, 0], [y, 1, 0]], np.float32))


def translate(pixels: np.ndarray, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """To the left by `x` pixels, and up by `y`."""
    return _moved(pixels, np.array([[1, 0, -x], [0, 1, -y]], np.float32))


def _moved(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The pixels under an affine map [2, 3] from the source to the result; grey comes in at the edges."""
    size = pixels.shape[1], pixels.shape[0]
    return cv2.warpAffine(pixels, matrix, size, flags=cv2.INTER_LINEAR, borderValue=GREY)


# (picture, strength as a share of MOST, sign) -> picture; in the order of unilm's list.
OPERATIONS: dict[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
    "identity": lambda pixels, share, sign: pixels,
    "autocontrast": lambda pixels, share, sign: autocontrast(pixels),
    "equalize": lambda pixels, share, sign: equalize(pixels),
    "brightness": lambda pixels, share, sign: brightness(pixels, 1.8 * share + 0.1),
    "sharpness": lambda pixels, share, sign: sharpness(pixels, 1.8 * share + 0.1),
    "shear_x": lambda pixels, share, sign: shear(pixels, x=sign * SHEAR * share),
    "shear_y": lambda pixels, share, sign: shear(pixels, y=sign * SHEAR * share),
    "translate_x": lambda pixels, share, sign: translate(pixels, x=sign * SHIFT * share),
    "translate_y": lambda pixels, share, sign: translate(pixels, y=sign * SHIFT * share),
    "rotate": lambda pixels, share, sign: rotate(pixels, sign * TURN * share),
}


@dataclass(frozen=True)
class RandAugment:
    """Applies `count` of the `operations` in turn, each drawn anew, so that one may come twice, and each with the
    `probability`."""

    count: int = 2
    strength: float = 7.0
    probability: float = 0.5
    operations: tuple[str, ...] = tuple(OPERATIONS)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"rand_augment.count={self.count} is below 1; use 2")
        if not 0 <= self.strength <= MOST:
            raise ValueError(f"rand_augment.strength={self.strength} is wrong; use 0 to {MOST:g}")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"rand_augment.probability={self.probability} is not a probability; use 0 to 1")
        unknown = [name for name in self.operations if name not in OPERATIONS]
        if unknown or not self.operations:
            raise ValueError(
                f"rand_augment.operations={self.operations} are wrong; use some of {', '.join(OPERATIONS)}"
            )

    def __call__(self, pixels: np.ndarray, rng: Generator) -> np.ndarray:
        # All are drawn, used or not: the sample's later random numbers never depend on it.
        chosen = rng.integers(len(self.operations), size=self.count).tolist()
        for place, (chance, side) in zip(chosen, rng.random((self.count, 2)).tolist(), strict=True):
            if chance < self.probability:
                pixels = OPERATIONS[self.operations[place]](pixels, self.strength / MOST, 1 if side < 0.5 else -1)
        return pixels
