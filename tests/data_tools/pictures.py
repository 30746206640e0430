"""Drawn pictures, their copies as the web makes them, and small shards, for the tests of duplicates and leaks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

from data_tools.drawn.scenes import draw_scene, random_scene
from tests import toys
from tests.toys import encoded


@cache
def scenes(n: int, size: int = 128, seed: int = 0) -> list[Image.Image]:
    """Kept, because drawing is the slowest thing in these tests."""
    rng = random.Random(seed)
    return [draw_scene(random_scene(rng, held_out=False), size, rng) for _ in range(n)]


def cut(image: Image.Image, part: float) -> Image.Image:
    width, height = image.size
    box = (width * part, height * part, width * (1 - part), height * (1 - part))
    return image.crop(tuple(round(side) for side in box))


# What happens to a picture on its way through the web; each is to be found.
COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "png": lambda image: encoded(image, "PNG"),
    "jpeg_30": lambda image: encoded(image, quality=30),
    "webp_40": lambda image: encoded(image, "WEBP", quality=40),
    "half": lambda image: encoded(image.resize((64, 64), Image.Resampling.BILINEAR)),
    "larger": lambda image: encoded(image.resize((218, 218), Image.Resampling.BICUBIC)),
    "squeezed": lambda image: encoded(image.resize((115, 128))),
    "darker": lambda image: encoded(ImageEnhance.Brightness(image).enhance(0.8)),
    "lighter": lambda image: encoded(ImageEnhance.Brightness(image).enhance(1.2)),
    "less contrast": lambda image: encoded(ImageEnhance.Contrast(image).enhance(0.75)),
    "cut": lambda image: encoded(cut(image, 0.01)),
}
mirrored = ImageOps.mirror


def write_shard(directory: Path, number: int, samples: Iterable[tuple[str, bytes | None, str | None]]) -> Path:
    """(key, picture, caption) of each sample."""
    listed = [{"key": key, "jpg": picture, "txt": caption, "json": b"{}"} for key, picture, caption in samples]
    return toys.write_shard(directory, number, listed)
