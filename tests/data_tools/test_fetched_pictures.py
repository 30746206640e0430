"""What training sees of a downloaded picture is what it would see of the picture itself."""

from __future__ import annotations

import io
import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools import download
from data_tools.fetch.pictures import TrainingCv2
from data_tools.fetch.reasons import reason_of
from pretrain.data.decoding import EXIF_ORIENTATION, decode_image
from pretrain.data.shards.reader import BadSample
from tests.toys import black_png, encoded, needs, picture, read_members

SIDE = 64  # --image-size
SMALL, LARGE = (40, 48), (160, 192)


def turned(orientation: int, size: tuple[int, int]) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return encoded(picture(orientation, *size), quality=95, exif=exif)


def deep(size: tuple[int, int], channels: int) -> bytes:
    """A 16-bit PNG: 1 channel grey, 3 colours, 4 colours with transparency."""
    pixels = picture(1, *size).astype(np.uint16) * 257
    alpha = np.full((*size, 1), 40_000, np.uint16)
    alpha[: size[0] // 2] = 0
    pixels = pixels[..., 0] if channels == 1 else np.concatenate([pixels, alpha], -1)[..., :channels]
    return cv2.imencode(".png", pixels)[1].tobytes()


def modes(size: tuple[int, int]) -> dict[str, bytes]:
    image = Image.fromarray(picture(2, *size))
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return {
        "grey": encoded(image.convert("L"), quality=95),
        "cmyk": encoded(image.convert("CMYK"), quality=95),
        "la": encoded(image.convert("LA"), "PNG"),
        "rgba": encoded(image, "PNG"),
        "webp": encoded(image, "WEBP", lossless=True),
    }


def originals() -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    for name, size in (("small", SMALL), ("large", LARGE)):
        made |= {f"{name} turned {orientation}": turned(orientation, size) for orientation in range(1, 9)}
        made |= {f"{name} 16 bits, {channels} channels": deep(size, channels) for channels in (1, 3, 4)}
        made |= {f"{name} {mode}": data for mode, data in modes(size).items()}
    return made


@pytest.mark.slow
def test_training_sees_a_downloaded_picture_as_it_sees_the_original(server, tmp_path):
    needs("img2dataset")
    made = originals()
    urls = [server.serve(f"{number}", data) for number, data in enumerate(made.values())]
    pq.write_table(pa.table({"url": urls, "caption": list(made)}), tmp_path / "list.parquet")
    line = ["--list", tmp_path / "list.parquet", "--preset", "canonical", "--out", tmp_path / "out", "--workers", 1]
    line += ["--image-size", SIDE, "--allow-address", "127.0.0.1/32"]
    assert download.main(list(map(str, line))) == 0
    members = read_members(tmp_path / "out")
    got = {json.loads(members[f"{name[:-3]}json"])["caption"]: members[name] for name in members if name[-3:] == "jpg"}
    assert got.keys() == made.keys()
    wrong = {}
    for name, data in made.items():
        seen, expected = decode_image(got[name]), decode_image(data)
        if min(expected.shape[:2]) > SIDE:
            scale = SIDE / min(expected.shape[:2])
            expected = cv2.resize(expected, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        same = seen.shape == expected.shape
        difference = np.abs(seen.astype(int) - expected).mean() if same else np.inf
        if difference > 6:  # what JPEG costs; a picture that lies has 50 and more
            wrong[name] = (seen.shape, difference)
    assert not wrong


def shown(data: bytes, max_pixels: int = 10_000) -> np.ndarray:
    return TrainingCv2(max_pixels).imdecode(np.frombuffer(data, np.uint8), -1)[..., ::-1]


@pytest.mark.parametrize("kind", ["GIF", "BMP", "AVIF"])
def test_formats_of_the_web_are_decoded_by_the_same_rules(kind):
    pixels = picture(3, *SMALL)
    data = encoded(pixels, kind)
    assert np.abs(shown(data).astype(int) - pixels).mean() < 10
    with pytest.raises(BadSample, match="not a readable JPEG, PNG or WebP header"):
        decode_image(data)


def test_transparency_is_on_white_in_every_format():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    for data in (encoded(image, "PNG"), encoded(image, "WEBP", lossless=True), encoded(image, "GIF")):
        assert (shown(data) == 255).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not_an_image"),
        (b"<html></html>", "not_an_image"),
        (encoded(picture(1))[:300], "not_an_image"),
        (encoded(Image.fromarray(picture(1)), "TIFF"), "not_an_image"),
        (black_png(101, 100, rows=100), "too_many_pixels"),
        (black_png(30_000, 30_000, rows=1, bits=1), "too_many_pixels"),
        (black_png(70_000, 1, rows=1), "too_many_pixels"),
    ],
    ids=["empty", "html", "truncated", "tiff", "above max_pixels", "bomb", "long side"],
)
def test_a_picture_that_is_not_decoded_has_its_reason(data, reason):
    with pytest.raises(BadSample) as raised:
        shown(data)
    assert reason_of(str(raised.value)) == reason


def test_the_rest_of_opencv_is_as_it_was():
    assert TrainingCv2(1).imencode is cv2.imencode and TrainingCv2(1).INTER_AREA == cv2.INTER_AREA
    assert Image.open(io.BytesIO(TrainingCv2(1).imencode(".png", picture(1))[1].tobytes())).size == (48, 40)
