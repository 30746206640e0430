"""The augmentations of BEiT's fine-tuning on ImageNet as timm has them (timm 1.0, data/auto_augment.py and
random_erasing.py; unilm beit/run_class_finetuning.py and beit3/run_beit3_finetuning.py: `--aa rand-m9-mstd0.5-inc1`,
`--reprob 0.25 --remode pixel --recount 1`). Pictures are uint8 [size, size, 3], RGB.

timm works on Pillow's pictures, and so does this file: results equal Pillow's to the digit; geometric operations are
bicubic and fill with grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageEnhance, ImageOps

MOST = 10.0  # the highest strength
GREY = (128, 128, 128)  # timm: the mean of BEiT's normalisation
ATTEMPTS = 10  # to find a rectangle that fits into the picture


def _moved(image: Image.Image, *matrix: float) -> Image.Image:
    where = Image.Transform.AFFINE
    return image.transform(image.size, where, matrix, resample=Image.Resampling.BICUBIC, fillcolor=GREY)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    """Pillow's ImageOps.posterize, and black for 0 bits, timm's strongest, which newer Pillows refuse."""
    return image.point([value & 0xFF << 8 - bits for value in range(256)] * 3)


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
    return image.point([min(255, value + add) if value < 128 else value for value in range(256)] * 3)


def _factor(share: float, sign: int) -> float:
    """The factor of an enhancement: 1, which changes nothing, plus or minus an amount that grows with the strength."""
    return max(0.1, 1.0 + sign * 0.9 * share)


# (picture, strength as a share of MOST, sign) -> picture: timm's _RAND_INCREASING_TRANSFORMS, in its order. The effect
# of each grows with the strength.
INCREASING: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "auto_contrast": lambda image, share, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, share, sign: ImageOps.equalize(image),
    "invert": lambda image, share, sign: ImageOps.invert(image),
    "rotate": lambda image, share, sign: image.rotate(sign * 30 * share, Image.Resampling.BICUBIC, fillcolor=GREY),
    "posterize": lambda image, share, sign: _posterize(image, 4 - int(4 * share)),
    "solarize": lambda image, share, sign: ImageOps.solarize(image, 256 - min(256, int(256 * share))),
    "solarize_add": lambda image, share, sign: _solarize_add(image, min(128, int(110 * share))),
    "color": lambda image, share, sign: ImageEnhance.Color(image).enhance(_factor(share, sign)),
    "contrast": lambda image, share, sign: ImageEnhance.Contrast(image).enhance(_factor(share, sign)),
    "brightness": lambda image, share, sign: ImageEnhance.Brightness(image).enhance(_factor(share, sign)),
    "sharpness": lambda image, share, sign: ImageEnhance.Sharpness(image).enhance(_factor(share, sign)),
    "shear_x": lambda image, share, sign: _moved(image, 1, sign * 0.3 * share, 0, 0, 1, 0),
    "shear_y": lambda image, share, sign: _moved(image, 1, 0, 0, sign * 0.3 * share, 1, 0),
    "translate_x": lambda image, share, sign: _moved(image, 1, 0, sign * 0.45 * share * image.width, 0, 1, 0),
    "translate_y": lambda image, share, sign: _moved(image, 1, 0, 0, 0, 1, sign * 0.45 * share * image.height),
}


@dataclass(frozen=True)
class TimmRandAugment:
    """timm's RandAugment, "rand-m9-mstd0.5-inc1" by default: `count` of the operations, each drawn anew and applied
    with the `probability`, at a strength from a normal distribution around `strength` with the deviation `deviation`,
    clipped to 0 to 10. timm's random numbers come from two global generators, here from the sample's."""

    count: int = 2
    strength: float = 9.0
    deviation: float = 0.5
    probability: float = 0.5
    operations: tuple[str, ...] = tuple(INCREASING)

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"rand_augment.count={self.count} is below 1; use 2")
        if not 0 <= self.strength <= MOST:
            raise ValueError(f"rand_augment.strength={self.strength} is wrong; use 0 to {MOST:g}")
        if not (math.isfinite(self.deviation) and self.deviation >= 0):
            raise ValueError(f"rand_augment.deviation={self.deviation} must be a number of at least 0; use 0.5")
        if not 0 <= self.probability <= 1:
            raise ValueError(f"rand_augment.probability={self.probability} is not a probability; use 0 to 1")
        if not self.operations or not set(self.operations) <= INCREASING.keys():
            raise ValueError(
                f"rand_augment.operations={self.operations} are wrong; use some of {', '.join(INCREASING)}"
            )

    def __call__(self, pixels: np.ndarray, rng: Generator) -> np.ndarray:
        # All are drawn, used or not: the sample's later random numbers never depend on it.
        chosen = rng.integers(len(self.operations), size=self.count).tolist()
        chances = rng.random((self.count, 2)).tolist()
        strengths = (self.strength + self.deviation * rng.standard_normal(self.count)).clip(0, MOST).tolist()
        image = None
        for place, (chance, side), strength in zip(chosen, chances, strengths, strict=True):
            if chance < self.probability:
                image = Image.fromarray(np.ascontiguousarray(pixels)) if image is None else image
                image = INCREASING[self.operations[place]](image, strength / MOST, 1 if side < 0.5 else -1)
        return pixels if image is None else np.array(image)


@dataclass(frozen=True)
class RandomErasing:
    """A rectangle of noise (arXiv 1708.04896; timm's mode "pixel", one rectangle), with a share of the picture's area
    between the two of `area`, and a ratio of height and width between `ratio` and its inverse. As in timm, the noise is
    standard normal in the normalised picture. But a byte can only hold values from -1 to 1 there, so that a third of
    the values are clipped, which timm's are not."""

    probability: float = 0.25
    area: tuple[float, float] = (0.02, 1 / 3)
    ratio: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"erase.probability={self.probability} is not a probability; use 0 to 1")
        if not 0 < self.area[0] <= self.area[1] < 1:
            raise ValueError(f"erase.area={self.area} is wrong because it is not 0 < low <= high < 1; use (0.02, 0.33)")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"erase.ratio={self.ratio} is wrong; use more than 0 and at most 1, such as 0.3")

    def __call__(self, pixels: np.ndarray, rng: Generator) -> np.ndarray:
        """uint8 [H, W, 3] -> the same shape; `pixels` is not changed."""
        height, width = pixels.shape[:2]
        # All numbers are drawn, used or not; noise, whose size varies, comes from a generator of its own.
        chance, top, left = rng.random(3).tolist()
        areas = rng.uniform(*self.area, size=ATTEMPTS).tolist()
        ratios = np.exp(rng.uniform(math.log(self.ratio), -math.log(self.ratio), size=ATTEMPTS)).tolist()
        noise = np.random.default_rng(rng.integers(2**63, size=2).tolist())
        if chance >= self.probability:
            return pixels
        for area, ratio in zip(areas, ratios, strict=True):
            h, w = (round(math.sqrt(height * width * area * by)) for by in (ratio, 1 / ratio))
            if h < height and w < width:
                y, x = int(top * (height - h + 1)), int(left * (width - w + 1))
                values = 127.5 + 127.5 * noise.standard_normal((h, w, pixels.shape[2]), np.float32)
                out = pixels.copy()
                out[y : y + h, x : x + w] = np.rint(values).clip(0, 255).astype(np.uint8)
                return out
        return pixels
