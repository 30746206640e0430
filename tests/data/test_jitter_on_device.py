"""Flip and jitter that the device does: the workers' pictures to one level, whatever a source makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.batch import Batch
from pretrain.data.loader import Loader
from pretrain.data.rand_augment import RandAugment
from pretrain.data.sources import ImageShards
from pretrain.data.transforms import ImageTransform, sample_rng
from pretrain.jitter import finished, jittered
from tests.data.test_loader import Looks
from tests.toys import SIZE, encoded, picture

ON_DEVICE = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.cuda)]


def both(build, **options) -> list[tuple[Batch, Batch]]:
    """(what the workers finish, what they leave) of two steps with two micro-steps."""
    loaders: list[Loader] = [
        build(accumulation=2, **options | {"loading": {"jitter_on_device": later, "workers": later}})
        for later in (False, True)
    ]
    return [
        pair for steps in zip(*(x.batches(0, 2) for x in loaders), strict=True) for pair in zip(*steps, strict=True)
    ]


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    apart = (a.cpu().int() - b.cpu().int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-4


@pytest.mark.parametrize("device", ON_DEVICE)
@pytest.mark.parametrize(
    "change",
    [{}, {"jitter": 0.9, "scale": (0.1, 1.0)}, {"jitter": 0.0}, {"flip": False}, {"jitter": 0.0, "flip": False}],
)
def test_pictures_equal_those_of_the_workers_to_one_level(device: str, change: dict) -> None:
    transform, count = ImageTransform(**change), 12
    data = [encoded(picture(seed, 260, 300), quality=90) for seed in range(count)]
    whole = np.stack([transform(each, sample_rng(0, 0, number)) for number, each in enumerate(data)])
    pixels = np.empty_like(whole)
    rngs = [sample_rng(0, 0, number) for number in range(count)]
    looks = [transform.unfinished(each, rng, out) for each, rng, out in zip(data, rngs, pixels, strict=True)]
    made = jittered(*(torch.from_numpy(value).to(device) for value in (pixels, np.array(looks))))
    assert_close(made, torch.from_numpy(whole))
    # The sample's next random numbers, from which its masks come, are the same too.
    after = [sample_rng(0, 0, number) for number in range(count)]
    for each, rng in zip(data, after, strict=True):
        transform(each, rng)
    assert [rng.random() for rng in after] == [rng.random() for rng in rngs]
    assert (pixels != whole).any() == bool(transform.jitter or transform.flip)


def test_nothing_but_the_pictures_knows_where_they_were_jittered(build) -> None:
    for plain, later in both(build, transform=ImageTransform(size=SIZE, jitter=0.9)):
        assert plain.looks is None and later.looks is not None and (plain.images != later.images).any()
        made = finished(later)
        assert made.looks is None and made.index is later.index and made.keys == plain.keys
        assert_close(made.images, plain.images)
        others, known = dict(made.tensors()), dict(plain.tensors())
        assert others.keys() == known.keys()
        assert all(torch.equal(others[name], known[name]) for name in known if name != "images")


def test_a_batch_of_many_parts_is_the_same_as_one_of_few(monkeypatch) -> None:
    images = torch.from_numpy(np.stack([picture(seed, 8, 8).transpose(2, 0, 1) for seed in range(7)]))
    rows = [[n % 2, 1.3, 0.7, 1.2, *np.random.default_rng(n).permutation(3)] for n in range(7)]
    looks = torch.tensor(rows, dtype=torch.float64)
    whole = jittered(images, looks)
    monkeypatch.setattr("pretrain.jitter._PART", 2)
    batch = Batch(None, images, *(torch.zeros(0) for _ in range(7)), looks=looks)  # type: ignore[arg-type]
    assert torch.equal(finished(batch).images, whole)
    empty = replace(batch, images=images[:0], looks=looks[:0])
    assert finished(empty).images.shape == images[:0].shape


@pytest.mark.parametrize("chosen", [0, 1, -1])
def test_a_source_that_makes_something_of_a_picture_gets_finished_ones(build, mix, monkeypatch, chosen: int) -> None:
    monkeypatch.setattr(Looks, "chosen", chosen)
    for plain, later in both(build, mix={"images": Looks(mix["images"].shards)}, counts={"images": 4}):
        assert torch.equal(finished(later).images, plain.images)
        assert torch.equal(later.extra["looks"], plain.extra["looks"])


class Negative(ImageShards):
    def decode(self, members, transform, tokenizer, rng):
        raw = super().decode(members, transform, tokenizer, rng)
        return raw._replace(image=255 - raw.image)


@pytest.mark.parametrize("crops", [0, 2])
def test_a_source_that_changes_a_picture_gets_finished_ones_too(build, mix, crops: int) -> None:
    source = Negative(mix["images"].shards, crops=crops)
    for plain, later in both(build, mix={"images": source}, counts={"images": 4}):
        assert torch.equal(finished(later).images, plain.images)
        assert torch.equal(later.image_masks, plain.image_masks)


def test_evaluation_leaves_nothing_to_the_device(build) -> None:
    loading = {"jitter_on_device": True}
    loader = build(transform=ImageTransform(size=SIZE, train=False), loading=loading)
    assert next(loader.batches(0, 1))[0].looks is None


def test_what_comes_behind_them_keeps_flip_and_jitter_in_the_workers(build) -> None:
    loading, transform = {"jitter_on_device": True}, ImageTransform(size=SIZE, rand_augment=RandAugment())
    assert next(build(transform=transform, loading=loading).batches(0, 1))[0].looks is None
    assert next(build(transform=ImageTransform(size=SIZE), loading=loading).batches(0, 1))[0].looks is not None
