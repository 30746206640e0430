"""Drawn pictures, their copies as the web makes them, and small shards, for the tests of duplicates and leaks."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from PIL import Image, ImageEnhance, ImageOps

from data_tools.drawn.scenes import draw_scene, random_scene


@cache
def scenes(n: int, size: int = 128, seed: int = 0) -> list[Image.Image]:
    """Kept, because drawing is the slowest thing in these tests."""
    rng = random.Random(seed)
    return [draw_scene(random_scene(rng, held_out=False), size, rng) for _ in range(n)]


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


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
    """(key, picture, caption) of each sample, as img2dataset lays them out."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{number:05d}.tar"
    with tarfile.open(path, "w") as tar:
        for key, picture, caption in samples:
            text = None if caption is None else caption.encode()
            for ending, data in (("jpg", picture), ("txt", text), ("json", b"{}")):
                if data is not None:
                    member = tarfile.TarInfo(f"{key}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    path.with_name(f"{number:05d}_stats.json").write_text(json.dumps({"successes": 0}))
    return path
