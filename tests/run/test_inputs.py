"""Before the start: whether this node has room for what the loader makes ahead."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pretrain.parallel.mesh import Place
from pretrain.recipes import find_recipe
from pretrain.run.inputs import build_loader
from tests.toys import image_sample, write_source

ALONE = Place(0, 0, 0, 0, 1)


@pytest.fixture
def images(tmp_path, monkeypatch):
    write_source(tmp_path / "images/train", [[image_sample(f"i{n}", n) for n in range(80)]])
    monkeypatch.setenv("DATA", str(tmp_path))
    recipe = find_recipe("tiny")
    return replace(recipe, loading=replace(recipe.loading, workers=2, prefetch=4)), recipe.stages["vision"]


# 64 pictures of 3 * 64 * 64 bytes and 17 rows of 24 bytes, 2 * 4 times: 6.2 MiB.
@pytest.mark.parametrize(("free", "here", "fits"), [(7, "1", True), (6, "1", False), (7, "2", False), (13, "2", True)])
def test_shared_memory_that_is_too_small_is_named_with_the_numbers(images, monkeypatch, free, here, fits):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free * 256, f_frsize=4096))
    if fits:
        build_loader(*images, None, ALONE)
        return
    need = 7 * int(here) - (here == "2")
    with pytest.raises(
        ValueError, match=f"has {free} MiB free, but 2 loading.workers \\* 4 .* need {need} MiB; .*--shm-size"
    ):
        build_loader(*images, None, ALONE)


def test_no_worker_needs_none(images, monkeypatch):
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=0, f_frsize=4096))
    recipe, stage = images
    build_loader(replace(recipe, loading=replace(recipe.loading, workers=0)), stage, None, ALONE)
