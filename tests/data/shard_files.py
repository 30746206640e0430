"""Writes shards as img2dataset does, good and bad, for tests. A sample is a dict: "key" and one entry per member."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.data.shards.indexing import index_directory

# What the loader's tests (conftest.py) ask for: pixels of a crop and a patch, sequences per global batch.
SIZE, PATCH = 32, 8
COUNTS = {"images": 12, "pairs": 12, "texts": 24}

Sample = dict  # {"key": str, "jpg": bytes, "txt": bytes, ...}


def picture(seed: int = 0, height: int = 40, width: int = 48) -> np.ndarray:
    """A smooth random picture uint8 [height, width, 3]: noise would not survive JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def png_bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG of 900 Mpx in 900 kB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    packer = zlib.compressobj()
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height // 30)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def image_sample(key: str, seed: int = 0, **size: int) -> Sample:
    return {"key": key, "jpg": encoded(picture(seed, **size)), "json": b"{}"}


def pair_sample(key: str, seed: int = 0, text: str | None = None, **size: int) -> Sample:
    return image_sample(key, seed, **size) | {"txt": (text or f"picture number {seed}").encode()}


def text_sample(key: str, text: str) -> Sample:
    return {"key": key, "txt": text.encode(), "json": b"{}"}


def write_tar(path: Path, samples: Sequence[Sample]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for sample in samples:
            for extension, data in sample.items():
                if extension == "key":
                    continue
                member = tarfile.TarInfo(f"{sample['key']}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_source(directory: Path, shards: Sequence[Sequence[Sample]]) -> Path:
    """Tars, `_stats.json`, `.idx` and `manifest.json`; returns the directory: a recipe's `shards`."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(shards):
        write_tar(directory / f"{number:05d}.tar", samples)
        (directory / f"{number:05d}_stats.json").write_text(
            json.dumps({"count": len(samples), "successes": len(samples)})
        )
    return index_source(directory)


def index_source(directory: Path) -> Path:
    index_directory(directory)
    return directory
