"""Converts one sample for a new shard: shrinks or re-encodes its picture and updates its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from pretrain.data.decoding import decode_image, read_header
from pretrain.data.shards.tar_index import IMAGE_EXTENSIONS, SECOND_PICTURE
from pretrain.json_files import parse_json

ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
FORMATS = ("keep", "jpg", "webp")


@dataclass(frozen=True)
class Recode:
    """Shrinks pictures whose longer side has more than `max_side` pixels, and re-encodes pictures in other formats than
    `format` ("keep": any is fine); all others keep their bytes."""

    max_side: int | None = None
    format: str = "keep"
    quality: int = 95

    def __post_init__(self) -> None:
        if self.max_side is not None and self.max_side < 1:
            raise ValueError(f"--max-side {self.max_side} is below 1; use 256 for training at 224")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality} lies outside 1 to 100; use 95")
        if self.format not in FORMATS:
            raise ValueError(f"--format {self.format} is unknown; use {', '.join(FORMATS)}")

    @property
    def keeps_all(self) -> bool:
        return self.max_side is None and self.format == "keep"

    def members(self, members: Mapping[str, bytes]) -> tuple[dict[str, bytes], dict[str, Any]]:
        """The members with converted pictures, and the changed metadata. Raises BadSample for a
        picture that must be converted and cannot be decoded."""
        out, facts = dict(members), dict[str, Any]()
        for extension in IMAGE_EXTENSIONS if not self.keeps_all else ():
            if extension not in members or (new := self.picture(members[extension])) is None:
                continue
            data, ending, width, height = new
            ending = extension if (extension, ending) == ("jpeg", "jpg") else ending
            # A second picture keeps its ending, whatever its format: readers take the first by it, and NLVR2's second.
            if ending in out or (extension == SECOND_PICTURE and len(out.keys() & set(IMAGE_EXTENSIONS)) > 1):
                ending = extension
            out = {
                (ending if name == extension else name): (data if name == extension else part)
                for name, part in out.items()
            }
            facts = facts or {"width": width, "height": height}
        return out, facts

    def picture(self, data: bytes) -> tuple[bytes, str, int, int] | None:
        """(bytes, ending, width, height) of the converted picture; None: it stays as it is."""
        header = read_header(data)
        current = ENDINGS[str(header.image.format)]
        ending = current if self.format == "keep" else self.format
        longer, shorter = max(header.width, header.height), min(header.width, header.height)
        scale = 1.0 if self.max_side is None else min(1.0, self.max_side / longer)
        if scale == 1.0 and ending == current:
            return None
        width, height = (max(1, round(side * scale)) for side in (header.width, header.height))
        pixels = decode_image(data, max(1, round(shorter * scale)))
        if pixels.shape[:2] != (height, width):
            pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
        return encode_picture(pixels, ending, self.quality), ending, width, height


def encode_picture(pixels: np.ndarray, ending: str, quality: int) -> bytes:
    """uint8 [H, W, 3] -> the bytes of a jpg, webp or png; `quality` of the first two, up to 100."""
    options = {"jpg": [cv2.IMWRITE_JPEG_QUALITY, quality], "webp": [cv2.IMWRITE_WEBP_QUALITY, quality], "png": []}
    done, data = cv2.imencode(f".{ending}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options[ending])
    assert done, (pixels.shape, ending)
    return data.tobytes()


def with_facts(data: bytes, facts: Mapping[str, Any]) -> bytes:
    """A sample's JSON with those of its values that `facts` has updated; anything but a JSON object stays as it is."""
    try:
        content = parse_json(data)
    except ValueError:
        return data
    if not isinstance(content, dict) or not content.keys() & facts.keys():
        return data
    return json.dumps(content | {key: value for key, value in facts.items() if key in content}, indent=4).encode()
