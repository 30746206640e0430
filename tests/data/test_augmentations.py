"""What fine-tuning does to pictures, labels and texts: against Pillow, against the formulas, the same on any ranks."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

from pretrain.batch import Kinds, Layout, make_batch
from pretrain.data import rand_augment
from pretrain.data.codes import plain
from pretrain.data.labelled import LabelledShards
from pretrain.data.loader import Loader
from pretrain.data.mixing import OTHER, SHARE, Mixing
from pretrain.data.mixture import Loading, Mixture, View
from pretrain.data.rand_augment import OPERATIONS, RandAugment
from pretrain.data.shards import reader
from pretrain.data.shards.reader import ShardError, ShardReader, load_manifest
from pretrain.data.sources import PairShards, TextShards
from pretrain.data.text_noise import TextNoise
from pretrain.data.timm_augment import INCREASING, RandomErasing, TimmRandAugment
from pretrain.data.transforms import ImageTransform, sample_rng
from pretrain.data.weighted import order_of
from pretrain.objectives.classification import ClassificationHead
from tests.toys import image_sample, picture, write_source

LOOK = ImageTransform(size=16, scale=(0.8, 1.0), jitter=0.0)
PICTURES = [picture(seed, 64, 64) for seed in range(3)] + [np.full((8, 8, 3), 9, np.uint8)]


@pytest.mark.parametrize("pixels", PICTURES, ids=range(len(PICTURES)))
def test_tables_are_pillows_to_the_digit(pixels):
    image = Image.fromarray(pixels)
    same = np.testing.assert_array_equal
    same(rand_augment.equalize(pixels), np.asarray(ImageOps.equalize(image)))
    near(rand_augment.autocontrast(pixels), ImageOps.autocontrast(image), 1)
    for factor in (0.1, 0.7, 1.0, 1.36, 1.9):
        near(rand_augment.brightness(pixels, factor), ImageEnhance.Brightness(image).enhance(factor), 1)
        near(rand_augment.sharpness(pixels, factor), ImageEnhance.Sharpness(image).enhance(factor), 2)


def near(own: np.ndarray, theirs: Image.Image, most: int) -> None:
    assert np.abs(own.astype(int) - np.asarray(theirs).astype(int)).max() <= most


def test_moves_are_pillows_but_for_rounding():
    """Pillow asks where a pixel comes from, about its middle; OpenCV where it goes, about its corner."""
    y, x = np.mgrid[:64, :64]
    pixels = np.stack([2 * x + y, x + y, 3 * y], -1).astype(np.uint8)  # smooth: a bilinear filter is exact on it
    image, grey = Image.fromarray(pixels), {"resample": Image.Resampling.BILINEAR, "fillcolor": (128, 128, 128)}
    inside = slice(16, 48)

    def transformed(*matrix: float) -> np.ndarray:
        return np.asarray(image.transform(image.size, Image.Transform.AFFINE, matrix, **grey)).astype(int)

    for own, theirs in (
        (rand_augment.translate(pixels, x=7), transformed(1, 0, 7, 0, 1, 0)),
        (rand_augment.translate(pixels, y=-3), transformed(1, 0, 0, 0, 1, -3)),
        (rand_augment.shear(pixels, x=0.2), transformed(1, -0.2, 0, 0, 1, 0)),
        (rand_augment.shear(pixels, y=-0.1), transformed(1, 0, 0, 0.1, 1, 0)),
        (rand_augment.rotate(pixels, 20), np.asarray(image.rotate(20, Image.Resampling.BILINEAR)).astype(int)),
    ):  # fmt: skip
        assert np.abs(own[inside, inside].astype(int) - theirs[inside, inside]).max() <= 3
    assert (rand_augment.translate(pixels, x=7)[:, -7:] == 128).all()


def test_rand_augment_draws_the_same_numbers_whatever_it_does():
    pixels, rest = PICTURES[0], set()
    for name in OPERATIONS:
        rng = sample_rng(0, 0, 5)
        out = RandAugment(operations=(name,), probability=1.0)(pixels, rng)
        rest.add(rng.random())
        assert out.shape == pixels.shape and out.dtype == np.uint8 and (out is pixels) == (name == "identity")
    assert len(rest) == 1
    often = Counter()
    for sample in range(400):
        rng = sample_rng(1, 0, sample)
        often[RandAugment(count=1)(pixels, rng) is pixels] += 1
    assert abs(often[True] / 400 - 0.55) < 0.08, "half of them, and a tenth of the others is the identity"
    before = pixels.copy()
    look = replace(LOOK, size=64, rand_augment=RandAugment(probability=1.0, operations=("rotate",)))
    look.finish(pixels.copy(), sample_rng(0, 0, 1))
    assert (before == pixels).all()
    still = replace(look, train=False)
    assert (still.finish(pixels.copy(), None) == replace(LOOK, size=64, train=False).finish(pixels.copy(), None)).all()
    assert "rand_augment" not in plain(LOOK) and plain(look)["rand_augment"]["count"] == 2, "old codes stay valid"


# A checksum of what timm 1.0.31 makes of PICTURES[0] at strength 9 (data/auto_augment.py, the ops of
# rand_augment_transform("rand-m9-mstd0.5-inc1") with bicubic moves, Pillow 13), with both signs where they matter.
TIMM = {
    "auto_contrast": [767279074], "equalize": [790605150], "invert": [768758630], "rotate": [732671903, 740540946],
    "posterize": [370612992], "solarize": [706861667], "solarize_add": [1072276276], "color": [731613819, 806772377],
    "contrast": [721104415, 809147581], "brightness": [1159665216, 142165192], "sharpness": [763152733, 763142485],
    "shear_x": [764686508, 756622427], "shear_y": [742796352, 752382866], "translate_x": [726161951, 768850641],
    "translate_y": [738185746, 759782215],
}  # fmt: skip


def test_operations_are_timms_to_the_digit():
    image = Image.fromarray(PICTURES[0])
    for name, theirs in TIMM.items():
        own = [np.asarray(INCREASING[name](image, 0.9, sign)).astype(np.int64) for sign in (1, -1)]
        sums = [int((pixels * (np.arange(pixels.size).reshape(pixels.shape) % 997)).sum()) for pixels in own]
        assert list(dict.fromkeys(sums)) == theirs, name
    assert list(TIMM) == list(INCREASING), "its list of operations, in its order"
    assert not np.asarray(INCREASING["posterize"](image, 1.0, 1)).any()


def test_timms_rand_augment_draws_the_same_numbers_whatever_it_does():
    pixels, rest, strengths = PICTURES[0], set(), list[float]()
    for name in INCREASING:
        rng = sample_rng(0, 0, 5)
        out = TimmRandAugment(operations=(name,), probability=1.0)(pixels, rng)
        rest.add(rng.random())
        assert out.shape == pixels.shape and out.dtype == np.uint8 and out.flags.writeable
    rng = sample_rng(0, 0, 5)
    assert TimmRandAugment(operations=("invert",), probability=0.0)(pixels, rng) is pixels
    assert rest == {rng.random()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INCREASING, "rotate", lambda image, share, sign: strengths.append(sign * share) or image)
        for sample in range(500):
            TimmRandAugment(1, operations=("rotate",))(pixels, sample_rng(0, 0, sample))
    drawn = 10 * np.abs(strengths)
    assert 200 < len(drawn) < 300 and drawn.max() == 10.0, "half of them; what is above 10 is cut"
    assert abs(np.median(drawn) - 9) < 0.15 and abs(np.quantile(drawn, 0.16) - 8.5) < 0.2
    assert abs(np.mean(np.array(strengths) > 0) - 0.5) < 0.1


def test_erasing_leaves_a_rectangle_of_noise():
    pixels, areas, rest = np.full((64, 64, 3), 7, np.uint8), list[float](), set()
    for sample in range(400):
        rng = sample_rng(0, 0, sample)
        out = RandomErasing()(pixels, rng)
        changed = (out != 7).any(-1)
        rest.add(rng.bit_generator.state["state"]["counter"][0] * 10 + rng.bit_generator.state["buffer_pos"])
        if out is pixels:
            continue
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        h, w = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        assert changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].mean() > 0.97, "noise may be 7 by chance"
        assert 0.25 < h / w < 4.0
        areas.append(h * w / 64**2)
    assert abs(len(areas) / 400 - 0.25) < 0.06 and min(areas) > 0.015 and max(areas) < 0.35
    assert abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.03 and (pixels == 7).all()
    assert len(rest) == 1, "it draws as many numbers whatever it does"
    always = RandomErasing(1.0)
    noise = always(pixels, sample_rng(0, 0, 3))[(always(pixels, sample_rng(0, 0, 3)) != 7).any(-1)].astype(float)
    assert abs(noise.mean() - 127.5) < 8 and 0.1 < (noise == 255).mean() < 0.22
    assert "erase" not in plain(LOOK) and plain(replace(LOOK, erase=RandomErasing()))["erase"]["ratio"] == 0.3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TimmRandAugment(count=0), "count=0 is below 1"),
        (lambda: TimmRandAugment(strength=11), "strength=11 is wrong"),
        (lambda: TimmRandAugment(deviation=-1), "deviation=-1 must be"),
        (lambda: TimmRandAugment(probability=2), "probability=2 is not"),
        (lambda: TimmRandAugment(operations=("cutout",)), "are wrong; use some of auto_contrast"),
        (lambda: RandomErasing(probability=2), "probability=2 is not"),
        (lambda: RandomErasing(area=(0.5, 0.2)), "area=.* is not 0 < low"),
        (lambda: RandomErasing(ratio=0.0), "ratio=0.0 is wrong"),
    ],
)
def test_wrong_settings_of_timms_are_one_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_mixup_and_cutmix_blend_pictures_as_their_share_says():
    one, other = PICTURES[0].transpose(2, 0, 1).copy(), PICTURES[1].transpose(2, 0, 1).copy()
    a, b = one.astype(float), other.astype(float)
    share = Mixing(mixup=0.8, cutmix=0.0).blend(one, other, sample_rng(0, 0, 0))
    assert 0 < share < 1
    np.testing.assert_allclose(one, share * a + (1 - share) * b, atol=0.51)
    np.testing.assert_allclose(other, share * b + (1 - share) * a, atol=0.51)
    for sample in range(20):
        one, other = np.zeros((3, 64, 64), np.uint8), np.ones((3, 64, 64), np.uint8)
        share = Mixing(mixup=0.0).blend(one, other, sample_rng(0, 0, sample))
        assert share == 1 - one.mean() == other.mean()
    shares = [Mixing(probability=0.5).blend(one, other, sample_rng(3, 0, sample)) for sample in range(200)]
    assert 70 < sum(share == 1 for share in shares) < 130


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("labelled")
    label = iter([0] * 12 + [1] * 6 + [2] * 6)

    def labelled(number: int) -> dict:
        return image_sample(f"s{number:02d}", number) | {"json": json.dumps({"label": next(label)}).encode()}

    return write_source(place, [[labelled(8 * shard + n) for n in range(8)] for shard in range(3)])


def loaded(source, ranks: int, size: int = 8, accumulation: int = 1, steps: int = 3, look=LOOK) -> list[list]:
    """Each step's samples in the global order: key, picture, extra."""
    out: list[list] = [[] for _ in range(steps)]
    mixture = Mixture({"images": source}, {"images": size}, accumulation, 5, Loading(workers=0, streams=2))
    for rank in range(ranks):
        loader = Loader(mixture, View(transform=look), rank=rank, ranks=ranks)
        for step, micro in enumerate(loader.batches(0, steps)):
            for batch in micro:
                for n, key in enumerate(batch.keys):
                    extra = {name: float(value[n]) for name, value in batch.extra.items()}
                    out[step].append((key, batch.images[n].numpy().tobytes(), extra))
    return out


def test_timms_augmentations_are_the_same_on_any_ranks(shards):
    source = LabelledShards(str(shards), classes=3)
    look = replace(LOOK, rand_augment=TimmRandAugment(probability=1.0), erase=RandomErasing(1.0))
    whole = loaded(source, 1, look=look)
    assert whole == loaded(source, 2, look=look) == loaded(source, 4, look=look) != loaded(source, 1)


def test_mixed_pictures_are_the_same_on_any_ranks_and_none_in_evaluation(shards):
    plain_source = LabelledShards(str(shards), classes=3)
    mixed = replace(plain_source, mixing=Mixing())
    whole = loaded(mixed, 1)
    assert whole == loaded(mixed, 2) == loaded(mixed, 4) == loaded(mixed, 2, accumulation=2)
    bare = loaded(plain_source, 1)
    for step, without in zip(whole, bare, strict=True):
        assert [key for key, *_ in step] == [key for key, *_ in without]
        for (_, _, a), (_, _, b) in zip(step[::2], step[1::2], strict=True):
            assert (a[OTHER], b[OTHER], a[SHARE]) == (b["label"], a["label"], b[SHARE])
        assert any(one != other for (_, one, _), (_, other, _) in zip(step, without, strict=True))
    still = replace(LOOK, train=False)
    assert loaded(mixed, 1, look=still) == loaded(plain_source, 1, look=still)
    with pytest.raises(ValueError, match=r"blends pictures in pairs, but batch\.images=8 gives 1 to each of 8 data"):
        loaded(mixed, 8)


def test_the_loss_of_blended_labels_is_that_of_blended_targets():
    torch.manual_seed(0)
    head = ClassificationHead(6, 4, smoothing=0.1)
    layout = Layout(images=3, patches=4)
    extra = {"label": torch.tensor([0, 1, 3]), OTHER: torch.tensor([1, 0, 3]), SHARE: torch.tensor([0.3, 0.3, 1.0])}
    batch = replace(make_batch(layout, images=torch.zeros(3, 3, 4, 4, dtype=torch.uint8)), extra=extra)
    rows = torch.randn(3, 5, 6)
    empty = torch.zeros(0, 0, 6)
    encoded = Kinds(rows, empty, empty, empty)
    share = extra[SHARE][:, None]
    target = share * F.one_hot(extra["label"], 4) + (1 - share) * F.one_hot(extra[OTHER], 4)
    wanted = F.cross_entropy(head.logits(encoded), 0.9 * target + 0.1 / 4)
    torch.testing.assert_close(head(encoded, batch)["loss"], wanted)


def test_weights_and_balance_decide_how_often_samples_come(shards):
    def often(source, steps: int) -> Counter:
        return Counter(key for step in loaded(source, 1, size=4, steps=steps) for key, *_ in step)

    parts = tuple(str(shards / f"{number:05d}.tar") for number in range(3))
    counts = often(LabelledShards(parts, weights=(0.5, 1.0, 0.0)), 6)  # two epochs of twelve
    assert {key.split("/")[1]: 0 for key in counts}.keys() == {"00000", "00001"}
    assert all(count == (1 if "/00000/" in key else 2) for key, count in counts.items()) and len(counts) == 16
    # Twelve, six and six of each class: eight looks each in an epoch of 24.
    steps = loaded(LabelledShards(str(shards), classes=3, balance=1.0), 2, size=4, steps=6)
    assert Counter(extra["label"] for step in steps for *_, extra in step) == {0: 8, 1: 8, 2: 8}


def test_balance_counts_labels_that_cannot_be_read_as_one_class(shards, tmp_path, monkeypatch):
    """They are bad samples, which training replaces when it comes to them, and no reason to refuse a run."""
    gone = shutil.copytree(shards, tmp_path / "gone")
    (gone / "00002.tar").unlink()
    source, how = LabelledShards(str(gone), classes=3, balance=1.0), {"seed": 1, "streams": 2, "block_shards": 1}
    with pytest.raises(ShardError, match=r"00002\.tar"):
        order_of(source, ShardReader(load_manifest(source.shards)), **how)
    order = order_of(source, ShardReader(load_manifest(source.shards)), skip_bad_shards=True, **how)
    assert order.samples == 24
    monkeypatch.setattr(reader, "MAX_TEXT_BYTES", 1)
    order = order_of(replace(source, shards=str(shards)), ShardReader(load_manifest(str(shards))), **how)
    assert order.samples == 24 and order.most == 1, "all of one class"


def test_noise_drops_and_replaces_words_and_leaves_the_pictures_generator_alone(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"Dog": ["hound"], "big": ["large", "huge"]}))
    text = 'a big, "dog" sits on the grass'
    noise = TextNoise(drop=0.0, replace=0.999, synonyms=str(tmp_path / "s.json"))
    rng = sample_rng(0, 1, 2)
    before = rng.random()
    said = noise(text, sample_rng(0, 1, 2))
    assert said in ('a large, "hound" sits on the grass', 'a huge, "hound" sits on the grass')
    again = sample_rng(0, 1, 2)
    noise(text, again)
    assert again.random() == before and noise(text, sample_rng(0, 1, 2)) == said
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    lengths = [len(TextNoise(drop=0.3)(" ".join(words), sample_rng(0, 0, n)).split()) for n in range(200)]
    assert abs(np.mean(lengths) - 7) < 0.4 and min(lengths) >= 1
    assert TextNoise(drop=0.99)("word", sample_rng(0, 0, 0)) == "word", "something always stays"
    assert PairShards("x", noise=noise).files == TextShards("x", noise=noise).files == (str(tmp_path / "s.json"),)
    assert PairShards("x").files == ()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: RandAugment(count=0), r"rand_augment\.count=0"),
        (lambda: RandAugment(strength=11), r"rand_augment\.strength=11"),
        (lambda: RandAugment(operations=("blur",)), r"rand_augment\.operations=.*use some of identity"),
        (lambda: Mixing(mixup=-1), r"mixing\.mixup=-1"),
        (lambda: Mixing(0.0, 0.0), "mix nothing; leave mixing out"),
        (lambda: TextNoise(drop=1.0), r"noise\.drop=1\.0 is not a share"),
        (lambda: TextNoise(replace=0.1), "set both or none"),
        (lambda: TextNoise(0.1, 0.1, "/nowhere")("a word", sample_rng(0, 0, 0)), "noise.synonyms=/nowhere cannot be"),
        (lambda: PairShards(("a", "b"), weights=(1.0,)), r"pairs\.weights=\(1\.0,\) are not one for each of the 2"),
        (lambda: TextShards("a", weights=(0.0,)), "not all 0; 1 is one look an epoch"),
        (lambda: LabelledShards("a", balance=2.0), r"images\.balance=2\.0 is not a share"),
        (lambda: LabelledShards("a", balance=1.0, weights=(1.0,)), "does not go with images.weights"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
