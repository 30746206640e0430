"""The loader with hostile shards, broken disks and users' mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pretrain.data.shards.reader import ShardError
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.data.transforms import ImageTransform
from tests.toys import COUNTS, encoded, full_beyond, image_sample, pair_sample, picture, png_bomb, write_source


def source(directory: Path, *shards: list[dict]) -> str:
    return str(write_source(directory, shards))


def test_every_bad_sample_is_replaced_counted_and_named(build, tmp_path: Path) -> None:
    good = [pair_sample(f"good{n}", n) for n in range(12)]
    text, jpeg = b"picture", encoded(picture(1))
    bad = [
        {"key": "broken", "jpg": b"\xff\xd8\xff\xe0 broken", "txt": text},
        {"key": "truncated", "jpg": jpeg[: len(jpeg) // 2], "txt": text},
        {"key": "empty", "jpg": b"", "txt": text},
        {"key": "bomb", "png": png_bomb(), "txt": text},
        {"key": "html", "jpg": b"<html></html>", "txt": text},
        {"key": "nocaption", "jpg": jpeg, "json": b"{}"},
        {"key": "nopicture", "txt": text},
        {"key": "latin1", "jpg": jpeg, "txt": b"caf\xe9"},
        {"key": "blank", "jpg": jpeg, "txt": b" \n"},
        {"key": "nothing", "jpg": jpeg, "txt": b""},
        {"key": "invisible", "jpg": jpeg, "txt": "\u200b".encode()},
    ]
    odd = [
        {"key": "cmyk", "jpg": encoded(Image.fromarray(picture(2)).convert("CMYK")), "txt": text},
        {"key": "deep", "png": encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"), "txt": text},
        {"key": "rgba", "png": encoded(Image.fromarray(picture(3)).convert("RGBA"), "PNG"), "txt": text},
        {"key": "dot", "webp": encoded(np.zeros((1, 1, 3), np.uint8), "WEBP"), "txt": text},
        {"key": "nul", "jpg": jpeg, "txt": b"a \x00 word\x00"},
        {"key": "long", "jpg": jpeg, "txt": b"many words " * 100_000},
    ]
    pairs = PairShards(
        source(tmp_path / "pairs", bad[:6] + good[:6] + odd[:3], odd[3:] + good[6:] + bad[6:]), text_len=8
    )
    samples = len(good) + len(bad) + len(odd)
    seen = []
    for world in (1, 2):
        quarantine = tmp_path / f"quarantine{world}.jsonl"
        keys: list[str] = []
        count = 0
        for rank in range(world):
            loader = build(
                mix={"pairs": pairs},
                counts={"pairs": 2},
                rank=rank,
                ranks=world,
                quarantine=quarantine,
                loading={"workers": world - 1},
            )
            mine = [key for step in loader.batches(0, -(-samples // 2)) for batch in step for key in batch.keys]
            keys, count = keys + mine, count + loader.replaced
        lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
        assert len(lines) == count >= len(bad)
        assert {(line["shard"][-9:], line["sample"]) for line in lines} >= {("00000.tar", n) for n in range(6)}
        assert all(line["error"] and line["source"] == "pairs" and line["step"] >= 1 for line in lines)
        names = {key.rsplit("/", 1)[1] for key in keys}
        assert names >= {s["key"] for s in good + odd} and not names & {s["key"] for s in bad}
        seen.append(sorted(keys))
    assert seen[0] == seen[1]
    loader = build(mix={"pairs": pairs}, counts={"pairs": 2}, quarantine=tmp_path / "full.jsonl")
    with full_beyond(10), pytest.raises(OSError, match=r"File too large: '.*full\.jsonl'"):
        list(loader.batches(0, samples // 2))


def test_a_source_without_a_good_sample_is_one_sentence(build, tmp_path: Path) -> None:
    pairs = PairShards(source(tmp_path, [{"key": f"{n}", "jpg": b"x", "txt": b"x"} for n in range(3)]), text_len=8)
    for workers in (0, 1):
        loader = build(mix={"pairs": pairs}, counts={"pairs": 2}, loading={"workers": workers})
        with pytest.raises(ValueError, match=r"^mix\.pairs: 3 samples .* cannot be used.*data_tools\.verify[^\n]*$"):
            next(loader.batches(0, 1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_an_unreadable_shard_is_an_error_that_names_it_or_is_skipped(
    build, tmp_path: Path, workers: int, damage: str
) -> None:
    shards = [[image_sample(f"{s}-{n}", n) for n in range(6)] for s in range(3)]
    images = {"images": ImageShards(source(tmp_path / "images", *shards))}
    tar = tmp_path / "images" / "00001.tar"
    begun = build(mix=images, counts={"images": 6}, loading={"workers": workers})
    if damage == "truncated":
        tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    else:
        tar.unlink()
    for use in (lambda: list(begun.batches(0, 3)), lambda: build(mix=images, counts={"images": 6})):
        with pytest.raises(ShardError) as caught:
            use()
        assert type(caught.value) is ShardError and "00001.tar" in str(caught.value) and "\n" not in str(caught.value)
    keys, replaced = [], 0
    for rank in range(2):
        skipping = {"workers": workers, "skip_bad_shards": True}
        loader = build(mix=images, counts={"images": 6}, ranks=2, rank=rank, loading=skipping)
        keys += [key for step in loader.batches(0, 3) for batch in step for key in batch.keys]
        replaced += loader.replaced
    assert replaced == 6 and len(keys) == 18 and not any("00001" in key for key in keys) and len(set(keys)) == 12


def test_bad_shards_one_after_another_are_skipped_and_bad_samples_between_them(build, tmp_path: Path) -> None:
    shards = [[image_sample(f"{s}-{n}", n) for n in range(3)] for s in range(6)]
    shards[4] = [{"key": f"4-{n}", "jpg": b"broken"} for n in range(3)]
    images = {"images": ImageShards(source(tmp_path, *shards))}
    for number in (0, 2, 3, 5):
        (tmp_path / f"{number:05d}.tar").unlink()
    for seed in range(6):  # in other orders
        skipping = {"skip_bad_shards": True, "streams": 2}
        loader = build(mix=images, counts={"images": 18}, seed=seed, loading=skipping)
        (batch,) = next(loader.batches(0, 1))
        assert {key.rsplit("/", 1)[1] for key in batch.keys} == {"1-0", "1-1", "1-2"} and len(batch.keys) == 18
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"cannot be used.*data_tools\.verify"):
        next(build(mix=images, counts={"images": 18}, loading=skipping).batches(0, 1))


def test_fewer_shards_than_ranks(build, tmp_path: Path) -> None:
    images = {"images": ImageShards(source(tmp_path, [image_sample(f"{n}", n) for n in range(16)]))}
    keys = []
    for rank in range(8):
        loader = build(mix=images, counts={"images": 8}, ranks=8, rank=rank, loading={"workers": rank % 2})
        keys += [key for step in loader.batches(0, 2) for batch in step for key in batch.keys]
    assert len(set(keys)) == len(keys) == 16


def test_an_empty_source_is_refused_at_once(build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        build(mix={"images": ImageShards(source(tmp_path / "a", []))}, counts={"images": 4})
    with pytest.raises(ValueError):
        build(mix={"images": ImageShards(str(tmp_path / "nowhere"))}, counts={"images": 4})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": COUNTS | {"pairs": 10}, "ranks": 4}, r"batch\.pairs=10 .*=4 \* 1=4; use batch\.pairs=8 or 12"),
        ({"counts": COUNTS | {"pairs": 3}, "ranks": 2, "accumulation": 2}, r"batch\.pairs=3 .*; use batch\.pairs=4$"),
        ({"counts": COUNTS | {"texts": 0}}, r"batch\.texts=0 "),
        ({"counts": {"images": 4}}, r"batch has \['images'\] but mix has"),
        ({"transform": ImageTransform(size=30)}, r"transform\.size=30 .*patch_size=8; use 24 or 32"),
        ({"transform": None}, r"mix\.images has pictures but the stage has no transform"),
        ({"tokenizer": None}, r"mix\.pairs has texts but there is no text tokenizer"),
        ({"mix": {}, "counts": {}}, "is empty; give a source"),
        ({"mix": {"pictures": None}, "counts": {"pictures": 4}}, r"mix\.pictures"),
        (
            {"mix": {"pairs": ImageShards("x")}, "counts": {"pairs": 4}},
            "such a source fills images; use it there",
        ),
        (
            {"mix": {"dual": PairShards("x"), "texts": TextShards("x")}, "counts": {"dual": 4, "texts": 4}},
            r"mix\.texts\.text_len=196 and mix\.dual\.text_len=64 differ",
        ),
        ({"loading": {"workers": -1}}, r"loading\.workers=-1"),
        ({"loading": {"prefetch": 0}}, r"loading\.prefetch=0"),
    ],
)
def test_an_impossible_mixture_is_one_sentence(build, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_too_short_a_text_length_is_refused() -> None:
    for source_type, kind in ((PairShards, "pairs"), (TextShards, "texts")):
        with pytest.raises(ValueError, match=rf"{kind}\.text_len=2"):
            source_type("x", text_len=2)
