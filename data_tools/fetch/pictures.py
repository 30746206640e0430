"""The download decodes as training does (pretrain/data/decoding.py): a picture looks the same whether it is resized
here or passed on as it came. It is upright by its EXIF, 16 bits are scaled to 8, transparency is on white, and a
picture of which a part is missing is refused.

Imports nothing that the environment of img2dataset lacks.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from pretrain.data.decoding import FORMATS, decode, judge_pixels, read_header
from pretrain.data.shards.reader import BadSample

# What else browsers show. These are always encoded anew, so training never meets them.
WEB_FORMATS = (*FORMATS, "GIF", "BMP", "AVIF")


class TrainingCv2:
    """Stands in for the module cv2 inside img2dataset's resizer: all of it, but `imdecode` decodes as training does."""

    def __init__(self, max_pixels: int):
        self._max_pixels = max_pixels

    def __getattr__(self, name: str) -> Any:
        return getattr(cv2, name)

    def imdecode(self, data: np.ndarray, flags: int) -> np.ndarray:
        """An encoded picture, uint8 [bytes] -> uint8 [H, W, 3] BGR. Raises BadSample, which names the reason, also for
        more than `max_pixels`. `flags` have no effect."""
        encoded = data.tobytes()
        try:
            header = read_header(encoded, WEB_FORMATS)
            judge_pixels(header, self._max_pixels)
            pixels = decode(encoded, header, min_side=None)
        except BadSample as error:
            raise BadSample(f"image decoding error: {error}") from None
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
