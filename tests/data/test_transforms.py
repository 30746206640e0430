"""Pictures: every kind that shards contain, hostile ones, and the transform as a function of its generator."""

from __future__ import annotations

import contextlib
import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from pretrain.data import decoding, transforms
from pretrain.data.codes import plain
from pretrain.data.decoding import decode_image, read_header
from pretrain.data.shards.reader import BadSample
from pretrain.data.transforms import ImageTransform, sample_rng
from pretrain.recipes import load_recipe
from tests.toys import encoded, picture, png_bomb

SMALL = ImageTransform(size=32)
RECIPES = ("tiny", "beit3_base", "beit3_large", "beit3_giant", "beit3_large_released", "vlmo_base", "vlmo_large")


def close(a: np.ndarray, b: np.ndarray, mean: float = 3.0) -> bool:
    return a.shape == b.shape and float(abs(a.astype(int) - b.astype(int)).mean()) < mean


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_plain_pictures_decode_unchanged(kind: str) -> None:
    pixels = picture(1)
    assert close(decode_image(encoded(pixels, kind)), pixels, 6)


def test_rgba_is_composited_onto_white() -> None:
    pixels = np.dstack([picture(2), np.full((40, 48), 255, np.uint8)])
    pixels[:20, :, 3] = 0
    for kind in ("PNG", "WEBP"):
        out = decode_image(encoded(pixels, kind, lossless=True))
        assert (out[:20] == 255).all() and (out[20:] == pixels[20:, :, :3]).all()


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256 * 8).astype(np.uint16).reshape(8, 256)
    out = decode_image(encoded(Image.fromarray(ramp), "PNG"))
    assert out.dtype == np.uint8 and (out[..., 0] == out[..., 2]).all()
    assert abs(out[..., 0].astype(int) - (ramp // 257).astype(int)).max() <= 1 and out.max() == 255
    ok, data = cv2.imencode(".png", np.repeat(ramp[:, :, None], 3, 2))  # Pillow writes no 16-bit RGB
    assert ok and abs(decode_image(data.tobytes())[..., 1].astype(int) - ramp // 257).max() <= 1


def test_palette_grey_bilevel_and_cmyk() -> None:
    pixels = picture(3)
    image = Image.fromarray(pixels)
    assert close(decode_image(encoded(image.convert("P", palette=Image.Palette.ADAPTIVE), "PNG")), pixels, 12)
    assert close(decode_image(encoded(image.convert("L"), "JPEG"))[..., 0], np.asarray(image.convert("L")))
    assert close(decode_image(encoded(image.convert("LA"), "PNG"))[..., 1], np.asarray(image.convert("L")))
    assert set(np.unique(decode_image(encoded(image.convert("1"), "PNG")))) <= {0, 255}
    assert close(decode_image(encoded(image.convert("CMYK"), "JPEG")), pixels, 8)
    transparent = image.convert("P", palette=Image.Palette.ADAPTIVE, colors=4)
    out = decode_image(encoded(transparent, "PNG", transparency=0))
    assert (out[np.asarray(transparent) == 0] == 255).all()


def test_the_smallest_picture_fills_a_crop() -> None:
    for kind in ("JPEG", "PNG", "WEBP"):
        data = encoded(np.full((1, 1, 3), 90, np.uint8), kind)
        assert decode_image(data).shape == (1, 1, 3)
        assert abs(ImageTransform(size=8, train=False)(data).astype(int) - 90).max() <= 3
        assert SMALL(data, sample_rng(0, 0, 0)).shape == (3, 32, 32)


@pytest.mark.parametrize("orientation", range(1, 10))
def test_exif_orientation_is_undone_equally_on_both_paths(orientation: int) -> None:
    exif = Image.Exif()
    exif[decoding.EXIF_ORIENTATION] = orientation
    pixels = picture(4, 64, 80)
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("WEBP", "RGB")):
        data = encoded(Image.fromarray(pixels).convert(mode), kind, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
        assert close(decode_image(data), expected)
        header = read_header(data)
        assert (header.height, header.width) == expected.shape[:2]
        half = decode_image(data, min_side=32)
        assert close(cv2.resize(half, expected.shape[1::-1]), expected, 5)


@pytest.mark.filterwarnings("error")
def test_broken_exif_costs_nothing() -> None:
    data = encoded(picture(5), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert close(decode_image(data), picture(5))


@pytest.mark.parametrize(
    ("min_side", "side"), [(None, 256), (129, 256), (128, 128), (64, 64), (33, 64), (32, 32), (1, 32)]
)
def test_a_jpeg_is_reduced_only_as_far_as_the_crop_allows(min_side: int | None, side: int) -> None:
    data = encoded(picture(6, 256, 300))
    assert min(decode_image(data, min_side).shape[:2]) == side
    assert decode_image(encoded(picture(6, 256, 300), "PNG"), min_side).shape == (256, 300, 3)


def test_a_crop_is_never_enlarged_when_the_picture_has_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    finish = ImageTransform.finish
    monkeypatch.setattr(
        ImageTransform, "finish", lambda self, crop, *rest: seen.append(crop.shape) or finish(self, crop, *rest)
    )
    transform = ImageTransform(size=32, scale=(0.2, 1.0))
    data = encoded(picture(7, 400, 500))
    reduced = 0
    for sample in range(40):
        box = transform.crop(400, 500, sample_rng(0, 0, sample))
        transform(data, sample_rng(0, 0, sample))
        assert min(seen[-1][:2]) >= 32
        reduced += seen[-1][0] < box.height
    assert reduced > 20


def test_a_crop_that_need_not_be_covered_comes_from_a_smaller_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, resize = [], transforms._resize
    monkeypatch.setattr(transforms, "_resize", lambda crop, *rest: seen.append(crop.shape) or resize(crop, *rest))
    whole, part = (ImageTransform(size=64, jitter=0, cover=cover) for cover in (1.0, 0.75))
    data, halved = encoded(picture(8, 146, 150), quality=95), 0
    for sample in range(40):
        plain_one, other = (transform(data, sample_rng(0, 0, sample)) for transform in (whole, part))
        full, reduced = seen[-2:]
        assert min(reduced[:2]) >= 48 and close(other, plain_one, 3)
        halved += reduced[0] < 0.6 * full[0]
        if reduced == full:
            assert (other == plain_one).all()
    assert 20 < halved < 40
    middle = ImageTransform(size=64, train=False, cover=0.75)(data)
    assert (middle == ImageTransform(size=64, train=False)(data)).all(), "an evaluation loses nothing"


def test_reduced_and_full_decoding_give_the_same_picture() -> None:
    pixels = picture(8, 512, 640)
    transform = ImageTransform(size=64, jitter=0)
    for sample in range(10):
        reduced = transform(encoded(pixels, quality=95), sample_rng(0, 0, sample))
        assert close(reduced, transform(encoded(pixels, "PNG"), sample_rng(0, 0, sample)), 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_are_refused_at_every_length(progressive: bool) -> None:
    data = encoded(picture(9, 100, 100), progressive=progressive, quality=90)
    for length in range(0, len(data) - 40, max(1, len(data) // 60)):
        with pytest.raises(BadSample):
            decode_image(data[:length])


def test_no_opencv_can_fill_a_truncated_jpeg_with_grey(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(9, 100, 100))
    monkeypatch.setattr(decoding, "simplejpeg", None)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: np.full((100, 100, 3), 128, np.uint8))
    assert (decode_image(data) == 128).all()
    with pytest.raises(BadSample):
        decode_image(data[: len(data) // 2])


def test_bytes_after_the_end_of_a_jpeg_do_no_harm() -> None:
    data = encoded(picture(9))
    assert (decode_image(data + b"\0" * 100) == decode_image(data)).all()
    assert close(decode_image(data + b"more"), decode_image(data), 1)  # Pillow's decoder, other rounding


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_truncated_pngs_and_webps_are_refused(kind: str) -> None:
    data = encoded(picture(10, 100, 100), kind)
    for part in (0.1, 0.5, 0.9):
        with pytest.raises(BadSample):
            decode_image(data[: int(len(data) * part)])


def test_random_damage_raises_bad_sample_or_nothing() -> None:
    rng = np.random.default_rng(0)
    files = [encoded(picture(11), kind) for kind in ("JPEG", "PNG", "WEBP")]
    for turn in range(300):
        data = bytearray(files[turn % 3])
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        with contextlib.suppress(BadSample):
            assert SMALL(bytes(data), sample_rng(0, 0, turn)).shape == (3, 32, 32)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 100,
        b"<html>not found</html>",
        b"\xff\xd8\xff",
        encoded(picture(), "GIF"),
        encoded(picture(), "TIFF"),
        encoded(picture(), "BMP"),
    ],
)
def test_other_formats_than_jpeg_png_and_webp_are_refused(data: bytes) -> None:
    with pytest.raises(BadSample):
        decode_image(data)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "decode", lambda *_: pytest.fail("decoded"))
    for width, height in ((30_000, 30_000), (9_000, 9_000), (100_000, 1_000)):
        with pytest.raises(BadSample, match="pixels"):
            SMALL(png_bomb(width, height), sample_rng(0, 0, 0))


def test_the_result_depends_on_seed_epoch_sample_and_stream_alone() -> None:
    data = encoded(picture(12, 100, 120))
    one = SMALL(data, sample_rng(1, 2, 3))
    assert one.dtype == np.uint8 and one.shape == (3, 32, 32)
    assert (SMALL(data, sample_rng(1, 2, 3)) == one).all()
    others = [sample_rng(2, 2, 3), sample_rng(1, 3, 3), sample_rng(1, 2, 4), sample_rng(1, 2, 3, stream=1)]
    assert all((SMALL(data, other) != one).any() for other in others)
    sample_rng(2**70, 0, 0), sample_rng(-1, 0, 2**40)  # any int is a seed


def test_generators_of_neighbours_do_not_overlap() -> None:
    rows = [sample_rng(0, epoch, sample).integers(0, 2**63, 1000) for epoch in range(4) for sample in range(4)]
    assert len(np.unique(np.concatenate(rows))) == 16_000


def test_crops_keep_scale_and_ratio() -> None:
    transform = ImageTransform(scale=(0.3, 0.6))
    boxes = [transform.crop(300, 400, sample_rng(0, 0, i)) for i in range(500)]
    areas = np.array([b.height * b.width for b in boxes]) / 120_000
    ratios = np.array([b.width / b.height for b in boxes])
    assert 0.295 < areas.min() < 0.32 and 0.58 < areas.max() < 0.605 and abs(areas.mean() - 0.45) < 0.02
    assert 0.74 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.35
    assert all(0 <= b.top <= 300 - b.height and 0 <= b.left <= 400 - b.width for b in boxes)
    assert {b.top == 0 for b in boxes} == {True, False}
    long = ImageTransform().crop(10, 1000, sample_rng(0, 0, 0))
    assert (long.height, long.width) == (10, 13)


def test_a_crop_is_the_first_of_ten_draws_that_fits() -> None:
    transform = ImageTransform(scale=(0.05, 1.0))
    for sample, (height, width) in enumerate(np.random.default_rng(0).integers(1, 900, (400, 2)).tolist()):
        rng, box = sample_rng(0, 0, sample), transform.crop(height, width, sample_rng(0, 0, sample))
        areas, ratios = height * width * rng.uniform(0.05, 1.0, 10), np.exp(rng.uniform(*np.log([3 / 4, 4 / 3]), 10))
        widths, heights = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
        fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
        if fits.any():
            assert (box.height, box.width) == (heights[fits.argmax()], widths[fits.argmax()])


def test_evaluation_takes_the_middle_square() -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 200
    out = ImageTransform(size=20, train=False)(encoded(pixels, "PNG"))
    assert (out == 200).all()


@pytest.mark.parametrize(("height", "width"), [(480, 640), (300, 224), (90, 100)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_squashed_picture_is_pillows_bicubic_one_from_edge_to_edge(kind: str, height: int, width: int) -> None:
    rng = np.random.default_rng(0)
    pixels = np.clip(picture(3, height, width) + rng.normal(0, 20, (height, width, 1)), 0, 255).astype(np.uint8)
    data = encoded(pixels, kind)
    expected = Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.BICUBIC)
    out = ImageTransform(train=False, evaluation="squash")(data).transpose(1, 2, 0)
    assert abs(out.astype(int) - np.asarray(expected).astype(int)).max() <= (5 if kind == "JPEG" else 0)
    assert not close(ImageTransform(train=False)(data), out.transpose(2, 0, 1), 0.5)


def test_published_models_are_evaluated_on_whole_pictures_and_tiny_on_the_middle() -> None:
    looks = {name: load_recipe(name, "retrieval", [])[1].transform.evaluation for name in RECIPES}
    assert looks.pop("tiny") == "crop" and set(looks.values()) == {"squash"}


def test_a_flip_is_half_of_the_time_and_can_be_turned_off() -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:, :16] = 255
    data = encoded(pixels, "PNG")
    for flip, share in ((True, 0.5), (False, 0.0)):
        transform = ImageTransform(size=32, scale=(1, 1), ratio=(1, 1), flip=flip, jitter=0)
        turned = [transform(data, sample_rng(0, 0, i))[0, 0, 0] == 0 for i in range(200)]
        assert abs(np.mean(turned) - share) < 0.12


def test_factors_lie_around_one_and_come_in_every_order() -> None:
    looks = np.array([ImageTransform(jitter=0.4)._look(sample_rng(0, 0, n)) for n in range(300)])
    factors, orders = looks[:, 1:4], looks[:, 4:]
    assert factors.shape == (300, 3) and 0.6 <= factors.min() < 0.62 and 1.38 < factors.max() <= 1.4
    assert len(np.unique(orders, axis=0)) == 6 and (np.sort(orders) == [0, 1, 2]).all()


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
def test_jitter_is_brightness_contrast_and_saturation_as_pillow_does_them(order: list[int]) -> None:
    pixels, factors = picture(13), [1.3, 0.7, 1.35]
    expected = Image.fromarray(pixels)
    for step in order:
        tool = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[step]
        expected = tool(expected).enhance(factors[step])
    out = transforms._jitter(pixels.copy(), [*factors, *order])
    assert abs(out.astype(int) - np.asarray(expected).astype(int)).max() <= 4


@pytest.mark.parametrize(
    "wrong",
    [
        *({"scale": (0.9, 0.5)}, {"ratio": (0, 1)}, {"jitter": 1.0}, {"size": 0}, {"evaluation": "fit"}),
        *({"cover": 0.4}, {"cover": 1.1}, {"cover": float("nan")}),
    ],
)
def test_invalid_settings_are_named(wrong: dict) -> None:
    with pytest.raises(ValueError, match=rf"transform\.{next(iter(wrong))}="):
        ImageTransform(**wrong)


def zone_plate(height: int, width: int) -> np.ndarray:
    """Rings that are finer the farther out, up to a change from pixel to pixel in the middle of each edge."""
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    rings = 127.5 + 127.5 * np.cos(np.pi * (height * y * y + width * x * x) / 4)
    return np.repeat(rings.round().astype(np.uint8)[:, :, None], 3, axis=2)


@pytest.mark.parametrize(
    ("height", "width"),
    [(400, 400), (420, 420), (440, 440), (448, 448), (449, 449), (500, 430), (600, 600), (900, 900)],
)
def test_rings_too_fine_for_the_result_leave_no_false_ones(height: int, width: int) -> None:
    """Where the original has finer rings than 224 pixels can show, the result is grey: its deviation in levels."""
    y, x = np.linspace(-1, 1, 224)[:, None], np.linspace(-1, 1, 224)[None, :]
    rim = (np.hypot(y, x) > 0.9) & (np.hypot(y, x) < 1)
    crop = zone_plate(height, width)
    out = ImageTransform(train=False).finish(crop, None)[0]
    assert out[rim].std() < 5
    # What can be shown is still there, as strong as Pillow shows it.
    middle = np.hypot(y, x) < 0.25
    pillow = np.asarray(Image.fromarray(crop).resize((224, 224), Image.Resampling.BICUBIC))[..., 0]
    assert out[middle].std() > 0.8 * pillow[middle].std()


@pytest.mark.parametrize("side", [57, 64])
def test_a_picture_that_is_not_made_smaller_is_not_blurred(side: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    expected = cv2.resize(pixels, (64, 64), interpolation=cv2.INTER_CUBIC)
    assert (ImageTransform(size=64, train=False).finish(pixels, None).transpose(1, 2, 0) == expected).all()


def test_stored_codes_do_not_depend_on_how_pictures_are_evaluated() -> None:
    assert plain(ImageTransform()) == plain(ImageTransform(evaluation="squash"))
    # Those that were stored before 2026-11-28 are of pictures without the blur, and say nothing of it.
    assert "antialias" not in plain(ImageTransform(antialias=False)) and plain(ImageTransform())["antialias"]
    assert "cover" not in plain(ImageTransform()) and plain(ImageTransform(cover=0.75))["cover"] == 0.75


def test_without_the_blur_pixels_are_those_of_before() -> None:
    pixels = picture(3, 300, 330)
    for size, method in ((224, cv2.INTER_LINEAR), (100, cv2.INTER_AREA), (400, cv2.INTER_CUBIC)):
        out = ImageTransform(size=size, train=False, antialias=False).finish(pixels, None).transpose(1, 2, 0)
        assert (out == cv2.resize(pixels, (size, size), interpolation=method)).all()
