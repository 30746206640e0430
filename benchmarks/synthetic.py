"""Pictures that benchmarks of the loader make themselves."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from pretrain.data.shards.indexing import index_directory

# Name -> (width, height, quality, deviation of the grain in levels). `imagenet` are of 500 x 375 pixels and about
# 100 kB, as ImageNet's JPEGs are on average.
PICTURES = {"256": (256, 256, 90, 0.0), "512": (512, 512, 90, 0.0), "imagenet": (500, 375, 93, 9.0)}


def write_synthetic(
    directory: Path, samples: int, width: int, height: int, quality: int = 90, grain: float = 0.0
) -> None:
    """Writes a shard of JPEGs that compress like photographs: noise at all scales, fading upwards, and above them all
    `grain`, its deviation in levels."""
    rng = np.random.default_rng(0)
    with tarfile.open(directory / "00000.tar", "w") as tar:
        for number in range(samples):
            pixels = np.full((height, width, 3), 128.0)
            for scale in (4, 16, 64):
                noise = rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)
                layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
                pixels += (np.asarray(layer) - 128.0) * 2 / scale**0.5
            if grain:
                pixels += rng.normal(0, grain, (height, width, 1))
            data = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "JPEG", quality=quality)
            member = tarfile.TarInfo(f"{number:09d}.jpg")
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))
    (directory / "00000_stats.json").write_text(json.dumps({"count": samples, "successes": samples}))
    index_directory(directory)
