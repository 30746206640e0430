"""A picture -> uint8 [3, size, size], from a random generator that belongs to the sample."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator, Philox
from PIL import Image

from pretrain.data.decoding import Header, OrdinaryJpeg, decode, judged_header
from pretrain.data.rand_augment import RandAugment
from pretrain.data.timm_augment import RandomErasing, TimmRandAugment
from pretrain.jitter import AS_IT_IS

# Up to this reduction the linear filter suffices, which reads two pixels a side, or four after the blur. Beyond it all
# pixels are averaged, which costs five times as much.
MOST_LINEAR = 2.25
EVALUATIONS = ("crop", "squash")


def sample_rng(seed: int, epoch: int, sample: int, stream: int = 0) -> Generator:
    """The only source of randomness of one sample in one epoch. `stream` separates sources with equal sample numbers.

    Philox increments the lowest word of its counter, so generators with different high words never overlap.
    """
    key = np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)
    return Generator(Philox(key=key, counter=np.array([0, 0, epoch, sample], dtype=np.uint64)))


@dataclass(frozen=True)
class Box:
    """A crop, in pixels of the upright full-size picture."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class ImageTransform:
    """Random resized crop, flip and colour jitter in training.

    In evaluation either the centre square, resized ("crop"), or the whole picture, whatever its shape, resized by
    Pillow's bicubic filter ("squash"), with which BEiT-3's and VLMo's published numbers were measured.

    The defaults are BEiT-3's (paper, Table 11: RandomResizedCrop, flip, jitter 0.4), except for the crop's scale, which
    was not published. Turn `flip` off if captions say left and right.

    `cover`: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size if the training crop's shorter side then still has at
    least `cover` * `size` pixels. 1 loses no detail, but for `size` 224 it hardly ever allows to decode pictures of 512
    pixels at half their size. 0.75 nearly always does, which takes little more than half the time, and at worst blurs
    the crop as if it had been three quarters as large.
    """

    size: int = 224
    scale: tuple[float, float] = (0.5, 1.0)  # of the picture's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height of the crop
    flip: bool = True
    jitter: float = 0.4  # brightness, contrast and saturation are each scaled by a factor in [1 - jitter, 1 + jitter]
    train: bool = True
    evaluation: str = "crop"  # or "squash"
    rand_augment: RandAugment | TimmRandAugment | None = None  # after flip and jitter, in training
    erase: RandomErasing | None = None  # after everything else, in training
    antialias: bool = True  # False: without the blur in `_resize`, for runs that began before 2026-11-28
    cover: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"transform.scale={self.scale} is wrong because it is not 0 < low <= high <= 1; use (0.5, 1)"
            )
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"transform.ratio={self.ratio} is wrong because it is not 0 < low <= high; use (0.75, 1.33)"
            )
        if not 0 <= self.jitter < 1:
            raise ValueError(
                f"transform.jitter={self.jitter} is wrong because it lies outside [0, 1); use 0.4, or 0 for none"
            )
        if self.evaluation not in EVALUATIONS:
            raise ValueError(f"transform.evaluation={self.evaluation} is unknown; use {' or '.join(EVALUATIONS)}")
        if not 0.5 <= self.cover <= 1:
            raise ValueError(
                f"transform.cover={self.cover} is wrong because it lies outside [0.5, 1]; use 1 to lose no detail, or "
                "0.75"
            )
        if self.size < 1:
            raise ValueError(f"transform.size={self.size} is wrong because it counts pixels; use 224")

    @property
    def squashes(self) -> bool:
        return not self.train and self.evaluation == "squash"

    def __call__(self, data: bytes, rng: Generator | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """Encoded picture -> uint8 [3, size, size], which is `out` if that is given. `rng` is needed in training only.
        Raises BadSample."""
        return self.finish(self._crop_of(data, rng), rng, out)

    def unfinished(self, data: bytes, rng: Generator, out: np.ndarray) -> list[float]:
        """Writes a training picture without flip and jitter to `out` -> a row of Batch.looks, by which pretrain.jitter
        does them on the device. Raises BadSample."""
        cv2.split(_resize(self._crop_of(data, rng), self.size, self.antialias), list(out))
        return self._look(rng)

    def _crop_of(self, data: bytes, rng: Generator | None) -> np.ndarray:
        header = judged_header(data)
        box = self.crop(header.height, header.width, rng)
        return cut(decode(data, header, self.min_side(box, header)), box, header)

    def min_side(self, box: Box, header: Header | OrdinaryJpeg) -> int | None:
        """The pixels that the picture's shorter side must have when it is decoded, None: all. The crop's has at least
        `size` then, so that decoding at a reduced size loses no detail, or `cover` times as many."""
        if self.squashes:
            return None
        side, least = min(header.height, header.width), self.size * (self.cover if self.train else 1.0)
        return math.ceil(least * side / min(box.height, box.width))

    def crop(self, height: int, width: int, rng: Generator | None) -> Box:
        """A random crop of a picture of this size, by `scale` and `ratio`; in evaluation its central square, or all of
        it."""
        if self.squashes:
            return Box(0, 0, height, width)
        if not self.train:
            side = min(height, width)
            return Box((height - side) // 2, (width - side) // 2, side, side)
        assert rng is not None, "a training transform needs the sample's generator"
        # Ten draws at once, used or not: the sample's later random numbers never depend on how many were rejected.
        areas = (height * width * rng.uniform(*self.scale, size=10)).tolist()
        ratios = np.exp(rng.uniform(math.log(self.ratio[0]), math.log(self.ratio[1]), size=10)).tolist()
        place = rng.random(2).tolist()
        for area, ratio in zip(areas, ratios, strict=True):  # in Python: numpy takes longer for so few numbers
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 1 <= w <= width and 1 <= h <= height:
                break
        else:  # the picture is too long or too wide: the largest crop with an allowed ratio
            w = min(width, max(1, round(height * self.ratio[1])))
            h = min(height, max(1, round(width / self.ratio[0])))
        return Box(int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w)

    def finish(self, crop: np.ndarray, rng: Generator | None, out: np.ndarray | None = None) -> np.ndarray:
        """A crop uint8 [h, w, 3] -> uint8 [3, size, size]: resized, and in training flipped, jittered and the
        like."""
        if self.squashes:
            whole = Image.fromarray(np.ascontiguousarray(crop)).resize((self.size, self.size), Image.Resampling.BICUBIC)
            pixels = np.asarray(whole)
        else:
            pixels = _resize(crop, self.size, self.antialias)
        if self.train:
            assert rng is not None, "a training transform needs the sample's generator"
            flip, *factors_and_order = self._look(rng)
            if flip:
                pixels = cv2.flip(pixels, 1, dst=pixels)
            if self.jitter:
                pixels = _jitter(pixels, factors_and_order)
            if self.rand_augment is not None:
                pixels = self.rand_augment(pixels, rng)
            if self.erase is not None:
                pixels = self.erase(pixels, rng)
        planes = np.empty((3, self.size, self.size), np.uint8) if out is None else out
        cv2.split(pixels, list(planes))  # in place: three times as fast as a transposed copy
        return planes

    def _look(self, rng: Generator) -> list[float]:
        """Draws a row of Batch.looks."""
        flip = float(self.flip and rng.random() < 0.5)
        if not self.jitter:
            return [flip, *AS_IT_IS[1:]]
        factors = rng.uniform(1 - self.jitter, 1 + self.jitter, size=3).tolist()
        return [flip, *factors, *rng.permutation(3).tolist()]


def cut(pixels: np.ndarray, box: Box, header: Header | OrdinaryJpeg) -> np.ndarray:
    """The box's pixels, where `pixels` may be a reduced copy of the picture."""
    y, x = pixels.shape[0] / header.height, pixels.shape[1] / header.width
    top, left = round(box.top * y), round(box.left * x)
    bottom, right = round((box.top + box.height) * y), round((box.left + box.width) * x)
    return pixels[top : max(bottom, top + 1), left : max(right, left + 1)]


def _resize(crop: np.ndarray, size: int, antialias: bool) -> np.ndarray:
    """uint8 [h, w, 3] -> uint8 [size, size, 3], fast and without aliases.

    A side that becomes smaller is first blurred by three taps: little just below its size, and from 1.7 times on so
    that a change from each pixel to the next, which `size` pixels cannot show, is gone. That leaves as little of a zone
    plate as Pillow's bicubic filter does (of 440 pixels: 2 levels of 255; without it 50). A JPEG of 500 x 375 pixels
    costs 1.6 ms with it, decoding and all, and 1.5 ms without; Pillow's filter alone takes 1.5 ms.
    """
    (height, width), whole = crop.shape[:2], size * size
    y, x = height / size, width / size
    if antialias and max(y, x) > 1:
        kernel = (3 if x > 1 else 1, 3 if y > 1 else 1)
        crop = cv2.GaussianBlur(crop, kernel, sigmaX=_sigma(x), sigmaY=_sigma(y))
    averaged = max(y, x) > MOST_LINEAR if antialias else height * width > 4 * whole
    smaller = cv2.INTER_AREA if averaged else cv2.INTER_LINEAR
    return cv2.resize(crop, (size, size), interpolation=smaller if height * width > whole else cv2.INTER_CUBIC)


def _sigma(ratio: float) -> float:
    """The sigma of the Gaussian with the taps t, 1 - 2 t, t, for a side that becomes `ratio` times smaller; t grows
    with it, up to a quarter."""
    t = min(0.25, max(0.25 * (ratio - 1) / 0.7, 0.001))
    return math.sqrt(-0.5 / math.log(t / (1 - 2 * t)))


def _jitter(pixels: np.ndarray, factors_and_order: list[float]) -> np.ndarray:
    """Brightness, contrast and saturation, each blended by its own factor, in the order of the last three numbers.
    Works in place, since copies would take half as long again."""
    for step in factors_and_order[3:]:
        f = factors_and_order[int(step)]
        if step == 0:
            pixels = cv2.convertScaleAbs(pixels, dst=pixels, alpha=f)
            continue
        grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
        if step == 1:
            pixels = cv2.addWeighted(pixels, f, pixels, 0, cv2.mean(grey)[0] * (1 - f), dst=pixels)
        else:
            pixels = cv2.addWeighted(pixels, f, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 1 - f, 0, dst=pixels)
    return pixels
