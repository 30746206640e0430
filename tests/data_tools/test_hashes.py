"""pictures.hashes: copies of a picture have close hashes, other pictures do not, and hashes are cached."""

from __future__ import annotations

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_tools.pictures.hashes import LEAST_CLEAR, caption_hash, hash_shards, look_alike, look_at, picture_hash
from tests.data_tools.pictures import COPIES, mirrored, scenes, write_shard
from tests.toys import encoded


def bits(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def thumbnails(looks) -> np.ndarray:
    return np.frombuffer(b"".join(look.thumbnail for look in looks), np.uint8).reshape(len(looks), -1)


@pytest.mark.parametrize("copy", COPIES)
def test_copies_look_alike(copy):
    pictures = scenes(20)
    originals = [look_at(encoded(picture, quality=90)) for picture in pictures]
    copies = [look_at(COPIES[copy](picture)) for picture in pictures]
    apart = np.array([bits(one.phash, other.phash) for one, other in zip(originals, copies, strict=True)])
    alike = look_alike(thumbnails(originals), thumbnails(copies))
    assert ((apart <= 6) & alike).mean() >= (0.7 if copy == "cut" else 0.9) and np.median(apart) <= 4, (apart, alike)


def test_other_pictures_do_not():
    looks = [look_at(encoded(picture, quality=90)) for picture in scenes(200, 64, seed=1)]
    one, other = np.triu_indices(200, 1)
    apart = np.array([bits(looks[i].phash, looks[j].phash) for i, j in zip(one, other, strict=True)])
    small = thumbnails(looks)
    assert 20 < np.median(apart) < 40
    assert ((apart <= 4) & look_alike(small[one], small[other])).mean() < 2e-4
    # The hash is not enough: it is of grey levels, and small things hardly change it.
    assert (apart <= 4).sum() > ((apart <= 4) & look_alike(small[one], small[other])).sum()


@pytest.mark.parametrize("what", ["same", "brighter", "one field", "one field's colour", "far brighter"])
def test_thumbnails_agree_but_for_brightness_and_contrast(what):
    fields = np.random.default_rng(0).integers(60, 140, (1, 64, 3)).astype(np.uint8)
    other = fields.copy()
    if what == "brighter":
        other[..., 0] = (fields[..., 0] * 1.3).astype(np.uint8)
    elif what == "far brighter":  # a shape on white is not the same as that shape on grey
        other[..., 0] += 60
    elif what.startswith("one field"):
        other[0, 9, 0 if what == "one field" else 2] += 50
    assert look_alike(fields.reshape(1, -1), other.reshape(1, -1)).tolist() == [what in ("same", "brighter")]


def test_the_mirrored_hash_is_that_of_the_mirrored_picture():
    for picture in scenes(20):
        look, other = look_at(encoded(picture, "PNG")), look_at(encoded(mirrored(picture), "PNG"))
        assert bits(look.mirrored, other.phash) <= 1
        assert look.phash == picture_hash(picture)


def test_the_hash_is_the_signs_of_the_lowest_waves():
    x = (np.arange(32) + 0.5) * np.pi / 32
    wave = 60 * np.cos(2 * x)[None, :] * np.cos(x)[:, None]  # two half waves along x, one along y
    pixels = np.repeat((128 + wave)[:, :, None], 3, axis=2).round().astype(np.uint8)
    # By frequency (u + v, u): 2 waves with a sum of 1, 3 with 2; of those with 3, (0, 3) comes before (1, 2).
    assert picture_hash(pixels) == 1 << (63 - 6)
    assert look_at(encoded(Image.fromarray(pixels), "PNG")).clear == 1


@pytest.mark.parametrize("colour", ["white", "black", (120, 30, 200)])
def test_blank_pictures_and_gradients_are_not_clear(colour):
    ramp = Image.linear_gradient("L").convert("RGB")
    for picture in (Image.new("RGB", (200, 150), colour), ramp):
        assert look_at(encoded(picture, quality=50)).clear < LEAST_CLEAR


def test_captions_are_equal_but_for_case_punctuation_and_blanks():
    one = caption_hash("A man, riding a  WAVE on\na surf-board.")
    assert one == caption_hash("a man riding a wave on a surf board") and one[1] == 9
    assert caption_hash("ﬁne café №1") == caption_hash("Fine CAFE\u0301 No1")
    assert one[0] != caption_hash("a man riding a wave on a surf boards")[0]
    assert caption_hash(" ...") == caption_hash("") and caption_hash("")[1] == 0
    assert caption_hash("一只猫在桌上")[1] == 6


def test_a_shard_is_hashed_once_and_again_when_it_changes(tmp_path):
    one, two, three = (encoded(picture) for picture in scenes(3, 64))
    tar = write_shard(tmp_path, 0, [("b", one, "a caption"), ("a", two, None), ("c", None, "text alone")])
    write_shard(tmp_path, 1, [("d", three, ""), ("e", b"<html>", "broken")])
    hashes = hash_shards(tmp_path, workers=2)
    assert [name[:2] for name in hashes.locate(np.arange(5))] == [
        *(("00000", key) for key in "abc"),
        *(("00001", key) for key in "de"),
    ]
    assert hashes.pictures.tolist() == [True, True, False, True, True] and hashes.damaged == 1
    assert hashes.words.tolist() == [2, 2, 1] and hashes.sample.tolist() == [1, 2, 4]
    assert hashes.phash[1] == look_at(one).phash and hashes.pixels.tolist() == [4096, 4096, 0, 4096, 0]
    assert not hashes.sha256[2].any() and hashes.sha256[4].any() and not hashes.thumbnails[[2, 4]].any()
    _, _, offset, size = hashes.locate(np.array([1]))[0]
    assert tar.read_bytes()[offset : offset + size] == one

    files = sorted((tmp_path / "hashes").glob("*.parquet"))
    before = [file.stat().st_mtime_ns for file in files]
    hash_shards(tmp_path)
    assert [file.stat().st_mtime_ns for file in files] == before
    write_shard(tmp_path, 0, [("b", three, "a caption"), ("a", two, None), ("c", None, "text alone")])
    os.utime(tar, ns=(1, 1))
    again = hash_shards(tmp_path)
    assert again.phash[1] == again.phash[3] and files[1].stat().st_mtime_ns == before[1]
    files[0].write_bytes(b"damaged")
    np.testing.assert_array_equal(hash_shards(tmp_path).phash, again.phash)
    problems = pq.read_table(files[1])["problem"].to_pylist()
    assert problems[0] is None and "not a readable JPEG" in problems[1]
