"""The comparison of loaders, at toy size: both give pictures of one shape, and every figure is there."""

from __future__ import annotations

import json

import pytest

from benchmarks import loader_against
from benchmarks.synthetic import write_synthetic
from pretrain.data.transforms import ImageTransform


def test_both_loaders_give_pictures_of_one_shape(tmp_path):
    pytest.importorskip("webdataset")
    write_synthetic(tmp_path, 6, 48, 40)
    transform = ImageTransform(size=16)
    usual = next(loader_against.usual(tmp_path, transform, 4, 0))
    (ours,) = next(loader_against.ours(tmp_path, transform, 4, 0))
    assert usual.shape == ours.images.shape == (4, 3, 16, 16) and usual.dtype == ours.images.dtype
    assert abs(usual.float().mean() - ours.images.float().mean()) < 40  # of 255: the same pictures, other crops


def test_every_figure_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_against, "BATCHES", 1)
    monkeypatch.setattr(loader_against, "SIZES", (16, 32))
    out = tmp_path / "figures.json"
    line = "--pictures 256 --samples 4 --batch 2 --rounds 2 --size 16 --out"
    assert loader_against.main([*line.split(), str(out)]) == 0
    figures = json.loads(out.read_text())["256"]
    assert figures["times_as_fast"] > 0 and figures["times_as_fast_by_the_least"] > 0
    assert set(figures["least_cpu_us_per_picture_by_size"]) == {"16", "32"}
    assert set(figures["workers"]["cpu_us_per_picture_workers"]) == {"1", "2"}  # in ticks: of so few it may be 0
