"""Pictures that decoders fill up without an error: each is refused, named by verify, and replaced in training."""

from __future__ import annotations

import json
import os
import struct
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from data_tools.pictures.filters import measure
from data_tools.verify import verify_directory
from pretrain.data.damage import imdecode
from pretrain.data.shards.reader import BadSample
from pretrain.data.sources import ImageShards
from pretrain.data.transforms import ImageTransform, decode_image, sample_rng
from tests.toys import black_png, encoded, image_sample, picture, write_source

END = b"\xff\xd9"


def grainy(height: int = 200, width: int = 240) -> np.ndarray:
    grain = np.random.default_rng(0).normal(0, 15, (height, width, 1))
    return np.clip(picture(1, height, width) + grain, 0, 255).astype(np.uint8)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2] + END


def interlaced_png(packed: int) -> bytes:
    """8 x 8 black RGB pixels in the seven passes of Adam7, which are 207 bytes when they are all there."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(packed))) + chunk(b"IEND", b"")


JPEG = encoded(grainy(), quality=90)
CMYK = encoded(Image.fromarray(grainy()).convert("CMYK"), quality=90)
WITH_GAP = JPEG[:5000] + bytes(3000) + JPEG[8000:]
DAMAGED = {
    "half a jpeg": half(JPEG),
    "half a progressive jpeg": half(encoded(grainy(), quality=90, progressive=True)),
    "half a jpeg in four colours": half(CMYK),
    "half a jpeg with bytes behind it": half(JPEG) + b"more",
    "a jpeg with a gap": WITH_GAP,
    "one row of a png": black_png(64, 64, rows=1),
    "all rows of a png but one": black_png(64, 64, rows=63),
    "an interlaced png": interlaced_png(132),
    "a png of one row of bits": black_png(64, 64, rows=1, bits=1),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_missing_pixels_are_a_bad_sample(name: str, capfd: pytest.CaptureFixture) -> None:
    for use in (
        decode_image,
        lambda data: decode_image(data, 32),
        lambda data: ImageTransform()(data, sample_rng(0, 0, 0)),
    ):
        with pytest.raises(BadSample, match="a part of the picture is missing"):
            use(DAMAGED[name])
    assert measure(DAMAGED[name]).problem is not None
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "data",
    [
        JPEG,
        CMYK,
        JPEG + b"more",
        JPEG + bytes(100),
        black_png(64, 64, rows=64),
        black_png(64, 65, rows=65, bits=1),
        black_png(1, 1, rows=1),
        encoded(Image.new("P", (30, 31)), "PNG"),
        encoded(Image.new("RGBA", (30, 31)), "PNG"),
        encoded(Image.new("I;16", (30, 31)), "PNG"),
        interlaced_png(207),
    ],
)
def test_whole_pictures_pass(data: bytes) -> None:
    assert decode_image(data).ndim == 3


def test_what_others_write_to_the_error_stream_is_kept(capfd: pytest.CaptureFixture, monkeypatch) -> None:
    decode = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *args: os.write(2, b"a line of somebody else\n") and decode(*args))
    for _ in range(2):
        pixels, damage = imdecode(half(JPEG), cv2.IMREAD_COLOR)
        assert pixels is not None and damage == "Corrupt JPEG data: premature end of data segment"
        assert capfd.readouterr().err == "a line of somebody else\n"
    child = os.fork()
    if child == 0:
        os._exit(0 if imdecode(half(JPEG), cv2.IMREAD_COLOR)[1] and not imdecode(JPEG, cv2.IMREAD_COLOR)[1] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_verify_names_them(tmp_path, capfd: pytest.CaptureFixture) -> None:
    samples = [
        {"key": "whole", "jpg": JPEG},
        {"key": "gap", "jpg": WITH_GAP},
        {"key": "rows", "png": black_png(9, 9, 2)},
    ]
    report = verify_directory(write_source(tmp_path / "data", [samples]), kind="images", decode=True)
    assert [(finding.key, "is missing" in finding.what) for finding in report.findings] == [
        ("gap", True),
        ("rows", True),
    ]
    assert "Corrupt" not in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_training_replaces_and_counts_them(tmp_path, build, workers: int) -> None:
    samples = [image_sample(f"{n}", n) for n in range(7)] + [{"key": "gap", "jpg": WITH_GAP}]
    source = ImageShards(str(write_source(tmp_path / "data", [samples])))
    loader = build(
        mix={"images": source},
        counts={"images": 8},
        quarantine=tmp_path / "quarantine.jsonl",
        loading={"workers": workers},
    )
    (batch,) = next(loader.batches(0, 1))
    assert len(batch.keys) == 8 and loader.replaced == 1 and not any(key.endswith("gap") for key in batch.keys)
    (line,) = map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())
    assert "Corrupt JPEG data" in line["error"]
