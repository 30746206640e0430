"""What is read of a JPEG without Pillow is what Pillow reads, and whatever is not ordinary is left to it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pretrain.data import decoding
from pretrain.data.decoding import judged_header, read_header
from pretrain.data.jpeg_header import ordinary_jpeg_size
from pretrain.data.shards.reader import BadSample
from pretrain.data.transforms import ImageTransform, sample_rng
from tests.toys import encoded, picture

PIXELS = picture(1, 48, 70)


def with_exif(**options) -> bytes:
    exif = Image.Exif()
    exif[decoding.EXIF_ORIENTATION] = 6
    return encoded(PIXELS, exif=exif, **options)


ORDINARY = [
    encoded(PIXELS),
    encoded(PIXELS, progressive=True, quality=95),
    encoded(PIXELS, subsampling="4:2:2", optimize=True, comment=b"a comment"),
    encoded(PIXELS, restart_marker_rows=1),
    encoded(Image.fromarray(PIXELS).convert("L")),
]
OTHERS = [
    with_exif(),
    encoded(PIXELS, xmp=b"<x/>"),
    encoded(PIXELS, icc_profile=b"p" * 200),
    encoded(Image.fromarray(PIXELS).convert("CMYK")),
    encoded(PIXELS, keep_rgb=True),
    encoded(PIXELS, "PNG"),
    encoded(PIXELS, "WEBP"),
    encoded(PIXELS, "MPO", save_all=True, append_images=[Image.fromarray(PIXELS)]),
    b"",
    b"\xff\xd8",
]


def of_pillow(data: bytes) -> tuple[int, int, int, bool]:
    header = read_header(data)
    return header.width, header.height, header.orientation, header.is_plain_jpeg


@pytest.mark.parametrize("data", ORDINARY)
def test_ordinary_jpegs_are_read_without_pillow(monkeypatch, data: bytes) -> None:
    expected = of_pillow(data)
    monkeypatch.setattr(decoding, "read_header", lambda _: pytest.fail("opened by Pillow"))
    header = judged_header(data)
    assert (header.width, header.height, header.orientation, header.is_plain_jpeg) == expected


@pytest.mark.parametrize("data", OTHERS)
def test_all_others_are_left_to_pillow(data: bytes) -> None:
    assert ordinary_jpeg_size(data) is None


def test_wherever_it_answers_pillow_answers_the_same() -> None:
    """Bytes that are changed, lost or added within the segments, cut off and put at another place."""
    rng, answers = np.random.default_rng(0), 0
    for turn in range(1500):
        data = bytearray((ORDINARY + OTHERS[:5])[turn % 10])
        end = data.find(b"\xff\xda") + 14
        for place in rng.integers(0, end, 1 + turn % 3).tolist():
            kind = int(rng.integers(4))
            value = int(rng.choice([rng.integers(256), 0, 2, 0xFF, 0xC0, 0xDB, 0xE1]))
            if kind == 0:
                del data[place : place + 1]
            elif kind == 1:
                data.insert(place, value)
            elif kind == 2 and turn % 5 == 0:
                del data[place:]
            elif place < len(data):
                data[place] = value
        if size := ordinary_jpeg_size(bytes(data)):
            answers += 1
            if min(size) > 0:
                assert of_pillow(bytes(data)) == (*size, 1, True)
    assert 100 < answers < 1400


@pytest.mark.parametrize(("width", "height"), [(65_500, 65_500), (9_000, 9_000), (0, 10), (10, 0)])
def test_sizes_beyond_all_use_are_judged_by_pillow_s_reader(width: int, height: int) -> None:
    data = ORDINARY[0]
    place = data.find(b"\xff\xc0") + 5
    data = data[:place] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[place + 4 :]
    assert ordinary_jpeg_size(data) == (width, height)
    with pytest.raises(BadSample):
        judged_header(data)


def test_pictures_are_the_same_as_with_pillow_s_header(monkeypatch) -> None:
    transform = ImageTransform(size=32)
    fast = [transform(data, sample_rng(0, 0, n)) for n, data in enumerate(ORDINARY)]
    monkeypatch.setattr("pretrain.data.transforms.judged_header", read_header)
    assert all((transform(data, sample_rng(0, 0, n)) == fast[n]).all() for n, data in enumerate(ORDINARY))
