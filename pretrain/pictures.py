"""From anything that a user may give as a picture to the bytes that the loader's own decoder reads."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

Picture: TypeAlias = str | os.PathLike | bytes | np.ndarray | Image.Image | Tensor  # a Tensor: the result of `look`


def encoded_picture(picture: Picture) -> bytes:
    """The bytes of a picture, for the loader's own decoder and its limits. ValueError for anything else."""
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | os.PathLike):
        return Path(picture).expanduser().read_bytes()
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3) or (picture.ndim == 3 and picture.shape[2] != 3):
            raise ValueError(f"an array {picture.dtype} {picture.shape} is no picture; give uint8 [H, W, 3] or [H, W]")
        picture = Image.fromarray(picture)
    if not isinstance(picture, Image.Image):
        raise ValueError(f"{type(picture).__name__} is no picture; give a path, bytes, a PIL picture or a uint8 array")
    upright, data = ImageOps.exif_transpose(picture), io.BytesIO()
    keeps = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # the modes of a PNG; others become RGB
    (upright if upright.mode in keeps else upright.convert("RGB")).save(data, "PNG", compress_level=0)
    return data.getvalue()
