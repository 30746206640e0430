"""simplejpeg is only faster: the pixels are OpenCV's to the bit, and what one refuses the other refuses too."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pretrain.data import decoding
from pretrain.data.decoding import decode_image
from pretrain.data.shards.reader import BadSample
from pretrain.data.transforms import ImageTransform, sample_rng
from tests.toys import encoded, picture

pytest.importorskip("simplejpeg")


def outcome(data: bytes, min_side: int | None = None) -> np.ndarray | str:
    try:
        return decode_image(data, min_side)
    except BadSample as error:
        return str(error)


def by_both(monkeypatch: pytest.MonkeyPatch, data: bytes, min_side: int | None = None) -> bool:
    """Whether simplejpeg had a part in it; asserts that nobody sees one."""
    taken = []
    sound = decoding._decode_sound_jpeg
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "_decode_sound_jpeg", lambda *a: taken.append(sound(*a)) or taken[-1])
        fast = outcome(data, min_side)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "simplejpeg", None)
        plain = outcome(data, min_side)
    assert np.array_equal(fast, plain) if isinstance(plain, np.ndarray) else fast == plain
    return any(pixels is not None for pixels in taken)


def rotated(pixels: np.ndarray) -> bytes:
    exif = Image.Exif()
    exif[decoding.EXIF_ORIENTATION] = 6
    return encoded(Image.fromarray(pixels), exif=exif)


def grainy(height: int, width: int) -> np.ndarray:
    grain = np.random.default_rng(0).normal(0, 30, (height, width, 3))
    return np.clip(picture(1, height, width) + grain, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("min_side", [None, 100, 60, 20, 4])
@pytest.mark.parametrize(
    "options",
    [
        *({"quality": quality, "subsampling": sub} for quality in (50, 95) for sub in ("4:4:4", "4:2:2", "4:2:0")),
        {"progressive": True},
        {"restart_marker_rows": 1},
        {"keep_rgb": True},
    ],
)
def test_pixels_are_the_same_to_the_bit(monkeypatch, options: dict, min_side: int | None) -> None:
    for height, width in ((201, 227), (128, 160)):
        assert by_both(monkeypatch, encoded(grainy(height, width), **options), min_side)


def test_pixels_of_grey_turned_and_tiny_pictures_are_the_same_to_the_bit(monkeypatch) -> None:
    grey = encoded(Image.fromarray(grainy(101, 67)).convert("L"))
    assert by_both(monkeypatch, grey) and by_both(monkeypatch, grey, 30)
    assert by_both(monkeypatch, rotated(grainy(80, 101))) and by_both(monkeypatch, rotated(grainy(80, 101)), 20)
    for side in range(1, 18):
        for min_side in (None, 1, 3):
            by_both(monkeypatch, encoded(grainy(side, 2 * side)), min_side)


def test_other_kinds_are_none_of_its_business(monkeypatch) -> None:
    image = Image.fromarray(grainy(40, 50))
    others = [encoded(image.convert("CMYK")), encoded(image, "PNG"), encoded(image, "WEBP"), encoded(image) + b"more"]
    assert not any(by_both(monkeypatch, data) for data in others)


def test_damage_is_judged_as_without_it(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    files = [encoded(grainy(72, 96), progressive=progressive, quality=90) for progressive in (False, True)]
    refused = 0
    for turn in range(240):
        data = bytearray(files[turn % 2])
        for place in rng.integers(0, len(data), 1 + turn % 3):
            data[place] = rng.integers(256)
        if turn % 5 == 0:
            data = data[: len(data) // 2] + b"\xff\xd9"
        by_both(monkeypatch, bytes(data), None if turn % 4 else 30)
        refused += isinstance(outcome(bytes(data)), str)
    assert 100 < refused < 240


def test_a_crop_is_the_same_with_both_decoders(monkeypatch) -> None:
    data, transform = encoded(grainy(300, 420)), ImageTransform(size=64, scale=(0.1, 1.0))
    fast = [transform(data, sample_rng(0, 0, sample)) for sample in range(20)]
    monkeypatch.setattr(decoding, "simplejpeg", None)
    plain = [transform(data, sample_rng(0, 0, sample)) for sample in range(20)]
    assert all((a == b).all() for a, b in zip(fast, plain, strict=True))
