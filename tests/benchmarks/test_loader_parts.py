"""The table of a picture's parts, at toy size: every part of the way is there, by what it says of real calls."""

from __future__ import annotations

import json

import pytest

from benchmarks import loader_parts
from benchmarks.loader_parts import parts
from pretrain.data.transforms import ImageTransform
from tests.toys import encoded, image_sample, picture, write_source, write_text_model

OF_A_PICTURE = {"read", "generator", "header", "crop_box", "decode", "resize", "blur", "flip_and_jitter", "mask"}
OF_ALL = {"whole", "whole_jitter_on_device", "stack", "transfer"}


def test_it_writes_every_part(tmp_path):
    out, words = tmp_path / "parts.json", loader_parts.CAPTION.split()
    model = write_text_model(tmp_path / "text.model", words * 20, 60)
    line = f"--pictures 256 --samples 2 --size 48 --seconds 0 --tokenizer {model} --out {out}"
    assert loader_parts.main(line.split()) == 0
    (figures,) = json.loads(out.read_text())["us_per_picture"].values()
    assert figures.keys() == OF_A_PICTURE | OF_ALL | {"caption_ids", "text_mask"}
    assert figures["whole_jitter_on_device"] > figures["header"] > 0  # each holds a decoding, and hundreds of headers


def test_pictures_that_cannot_be_decoded_are_left_out(tmp_path):
    bad = {"key": "2", "jpg": b"no picture"}
    shards = write_source(tmp_path / "some", [[image_sample("1"), bad, {"key": "3", "jpg": encoded(picture(3))}]])
    assert parts(str(shards), ImageTransform(size=32), 8, 0).keys() == OF_A_PICTURE | OF_ALL
    shards = write_source(tmp_path / "none", [[bad]])
    with pytest.raises(ValueError, match="none of the first 1 samples"):
        parts(str(shards), ImageTransform(size=32), 8, 0)
