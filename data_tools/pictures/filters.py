"""Filters for downloaded pictures: the measures of a picture, and the measures that are rejected.

The measures are pure functions of uint8 [H, W, 3] RGB; `reasons` compares them with thresholds, for many samples at
once, so that other thresholds need no second pass over the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from pretrain.data.decoding import decode_image, read_header
from pretrain.data.shards.reader import BadSample

# Pictures are measured as small copies: at least this shorter side when decoded, then this longer side. A small copy
# has the same contrast and colours, and costs a tenth.
DECODED_SIDE, MEASURED_SIDE = 96, 128
# Difference per channel, out of 255, that counts as the same colour: JPEG noise on a flat ground has 3 to 8.
SAME_COLOUR = 12

REASONS = ("undecodable", "too_small", "extreme_aspect", "blank", "low_entropy", "one_colour")  # in this order
REPEATED = "caption_repeats"


class Measures(NamedTuple):
    """`problem`: why the picture cannot be decoded; then the other measures are 0."""

    width: int = 0
    height: int = 0
    contrast: float = 0.0
    entropy: float = 0.0
    one_colour: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class PictureSettings:
    """The thresholds. Values that let everything pass: 1, inf, 0, 0, 1, 0."""

    min_side: int = 64
    max_aspect: float = 3.0
    min_contrast: float = 4.0
    min_entropy: float = 0.4  # one small shape on a plain ground has 0.5
    max_one_colour: float = 0.98
    max_caption_repeats: int = 100

    def __post_init__(self) -> None:
        for name, low, high, use in (
            ("min_side", 1, math.inf, "pixels, such as 64"),
            ("max_aspect", 1, math.inf, "1 (squares only) or more, such as 3"),
            ("min_contrast", 0, 128, "0 (anything) to 128 levels"),
            ("min_entropy", 0, 8, "0 (anything) to 8 bits"),
            ("max_one_colour", 0, 1, "a share of the pixels, 0 to 1 (anything)"),
            ("max_caption_repeats", 0, math.inf, "1 or more, or 0 for any number"),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"--{name.replace('_', '-')}={value} is out of range; use {use}")


def measure(data: bytes) -> Measures:
    """The measures of an encoded picture; never raises, whatever the bytes are."""
    try:
        header = read_header(data)
        pixels = decode_image(data, DECODED_SIDE)
    except BadSample as error:
        return Measures(problem=str(error))
    small = _small(pixels)
    return Measures(header.width, header.height, contrast(small), entropy(small), one_colour(small))


def contrast(pixels: np.ndarray) -> float:
    """Standard deviation of the channel that differs most, in levels of 255: 0 for a blank picture, 40 to 80 for
    photos. Not of the brightness: a red star can be as bright as its green ground."""
    return float(cv2.meanStdDev(pixels)[1].max())


def entropy(pixels: np.ndarray) -> float:
    """Entropy of the brightness histogram in bits: 0 for one level, 8 for a uniform one. Photos have 6.5 to 7.8,
    drawings of plain shapes 0.5 to 4."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    counts = np.bincount(grey.ravel(), minlength=256)
    shares = counts[counts > 0] / counts.sum()
    return float(abs((shares * np.log2(shares)).sum()))


def one_colour(pixels: np.ndarray) -> float:
    """The share of pixels within SAME_COLOUR of the median colour, which is the ground's if there is one."""
    median = np.median(pixels[::2, ::2].reshape(-1, 3), axis=0)  # a quarter of the pixels is enough
    low, high = np.ceil(median - SAME_COLOUR), np.floor(median + SAME_COLOUR)
    return cv2.countNonZero(cv2.inRange(pixels, low, high)) / (pixels.shape[0] * pixels.shape[1])


def reasons(measures: Mapping[str, np.ndarray], settings: PictureSettings) -> np.ndarray:
    """int [N]: the index in REASONS of the first reason to reject a sample, -1 if it passes. `measures`: [N] each, by
    the names of Measures; `problem` as bool."""
    width, height = (measures[name].astype(np.float64) for name in ("width", "height"))
    rejections = (
        measures["problem"],
        np.minimum(width, height) < settings.min_side,
        np.maximum(width, height) > settings.max_aspect * np.minimum(width, height),
        measures["contrast"] < settings.min_contrast,
        measures["entropy"] < settings.min_entropy,
        measures["one_colour"] > settings.max_one_colour,
    )
    return np.select(rejections, range(len(REASONS)), -1)


def _small(pixels: np.ndarray) -> np.ndarray:
    scale = MEASURED_SIDE / max(pixels.shape[:2])
    if scale >= 1:
        return pixels
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
