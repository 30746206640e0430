"""data_tools.pictures.filters: the measures of pictures whose answer is known, and what thresholds make of them."""

from __future__ import annotations

import numpy as np
import pytest

from data_tools.pictures.filters import (
    REASONS,
    Measures,
    PictureSettings,
    contrast,
    entropy,
    measure,
    one_colour,
    reasons,
)
from tests.toys import encoded, picture


def flat(height: int, width: int, colour: tuple[int, int, int] = (90, 120, 60)) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def scene(height: int = 300, width: int = 400) -> np.ndarray:
    """Smooth random colours: as full of grey levels as a photo."""
    return picture(0, height, width)


def judged(*measures: Measures, settings: PictureSettings | None = None) -> list[str]:
    names = ("width", "height", "contrast", "entropy", "one_colour")
    columns = {name: np.array([getattr(m, name) for m in measures]) for name in names}
    columns["problem"] = np.array([m.problem is not None for m in measures])
    found = reasons(columns, settings or PictureSettings())
    return ["" if i < 0 else REASONS[i] for i in found]


def test_measures_of_pictures_whose_answer_is_known():
    halves = flat(64, 64, (0, 0, 0))
    halves[:32] = 255
    assert contrast(halves) == pytest.approx(127.5) and contrast(flat(64, 64)) == 0
    assert entropy(halves) == pytest.approx(1) and entropy(flat(64, 64)) == 0
    levels = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16)[:, :, None], 3, 2)
    assert entropy(levels) == pytest.approx(8)
    quarter = flat(64, 64)
    quarter[:16] = (90, 120, 60 + 13)
    assert one_colour(quarter) == pytest.approx(0.75)
    quarter[:16] = (90, 120, 60 + 12)
    assert one_colour(quarter) == 1


def test_colours_as_bright_as_each_other_are_not_blank():
    stripes = flat(64, 64, (255, 0, 0))
    stripes[::2] = (0, 130, 0)  # 76 of 255 as grey, like the red
    assert contrast(stripes) > 100 and entropy(stripes) < 0.1


@pytest.mark.parametrize(
    ("pixels", "kind", "reason"),
    [
        (scene(), "JPEG", ""),
        (scene(), "PNG", ""),
        (scene(), "WEBP", ""),
        (scene(63, 100), "JPEG", "too_small"),
        (scene(64, 100), "JPEG", ""),
        (scene(100, 301), "JPEG", "extreme_aspect"),
        (scene(300, 100), "JPEG", ""),
        (flat(200, 200), "JPEG", "blank"),
        (np.clip(flat(200, 200) + np.random.default_rng(0).integers(0, 5, (200, 200, 3)), 0, 255), "PNG", "blank"),
    ],
)
def test_each_picture_falls_under_its_reason(pixels, kind, reason):
    assert judged(measure(encoded(np.asarray(pixels, np.uint8), kind))) == [reason]


def test_a_page_with_a_stroke_has_low_entropy_or_one_colour():
    page = flat(400, 400, (255, 255, 255))
    page[195:205, 100:240] = 0
    found = measure(encoded(page, "PNG"))
    assert judged(found) == ["low_entropy"]
    assert judged(found, settings=PictureSettings(min_entropy=0)) == ["one_colour"]
    assert judged(found, settings=PictureSettings(min_entropy=0, max_one_colour=1)) == [""]


def test_what_cannot_be_decoded_says_why_and_comes_first():
    whole = encoded(scene(1000, 1000))
    for data in (b"", b"<html>", whole[: len(whole) // 2], b"GIF89a" + bytes(100)):
        found = measure(data)
        assert found.problem and judged(found) == ["undecodable"]


def test_a_large_picture_measures_as_its_small_copy_does():
    large, small = measure(encoded(scene(1200, 1600))), measure(encoded(scene(150, 200)))
    assert (large.width, large.height) == (1600, 1200)
    assert large.contrast == pytest.approx(small.contrast, rel=0.05)
    assert large.entropy == pytest.approx(small.entropy, rel=0.05)


def test_thresholds_that_let_everything_pass():
    settings = PictureSettings(1, float("inf"), 0, 0, 1, 0)
    assert judged(measure(encoded(flat(1, 500))), settings=settings) == [""]


@pytest.mark.parametrize("wrong", [{"min_side": 0}, {"max_aspect": 0.5}, {"min_entropy": 9}, {"max_one_colour": 2}])
def test_thresholds_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=rf"--{next(iter(wrong)).replace('_', '-')}=.* is out of range; use "):
        PictureSettings(**wrong)
