"""One picture with pairs of pictures side by side, for looking at near duplicates."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw

from pretrain.data.decoding import decode_image
from pretrain.data.shards.reader import BadSample
from pretrain.files import write_file

Place = tuple[Path, int, int]  # file, offset and size of the encoded picture
_SIDE, _GAP, _TEXT, _COLUMNS = 128, 8, 14, 4


class Pair(NamedTuple):
    left: Place
    right: Place
    label: str


def write_contact_sheet(path: Path, pairs: list[Pair]) -> None:
    """A PNG with four pairs in a row."""
    rows = max(1, -(-len(pairs) // _COLUMNS))
    wide, high = 2 * _SIDE + 2 * _GAP, _SIDE + _TEXT + _GAP
    sheet = Image.new("RGB", (_COLUMNS * wide, rows * high), "white")
    draw = ImageDraw.Draw(sheet)
    for number, pair in enumerate(pairs):
        x, y = number % _COLUMNS * wide, number // _COLUMNS * high
        draw.text((x, y), pair.label[-44:].encode("ascii", "replace").decode(), fill="black")
        for place, shift in ((pair.left, 0), (pair.right, _SIDE + 2)):
            sheet.paste(_thumbnail(place), (x + shift, y + _TEXT))
    data = io.BytesIO()
    sheet.save(data, "PNG")
    write_file(path, data.getvalue())


def _thumbnail(place: Place) -> Image.Image:
    path, offset, size = place
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(size)
    try:
        pixels = decode_image(data, _SIDE)
    except BadSample:  # it could be decoded when it was hashed, but files change
        return Image.new("RGB", (_SIDE, _SIDE), "grey")
    scale = _SIDE / max(pixels.shape[:2])
    shape = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    return Image.fromarray(np.ascontiguousarray(cv2.resize(pixels, shape, interpolation=cv2.INTER_AREA)))
