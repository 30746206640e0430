"""Stored codes equal those that training makes itself: equal batches, equal losses; mismatches are errors."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.batch import Batch
from pretrain.checkpoint.weights import write_weights
from pretrain.config import BatchSize, Recipe, Stage, to_json
from pretrain.data.codes import Coding, StoredCodes, file_heads
from pretrain.data.shards.reader import BadSample, ShardError, ShardReader, load_manifest
from pretrain.data.sources import ImageShards
from pretrain.encode_images import encode_directory, load_encoder
from pretrain.parallel.mesh import Place
from pretrain.recipes import find_recipe
from pretrain.run.build import build_task
from pretrain.run.image_targets import image_targets
from pretrain.run.inputs import build_loader
from tests.small_run import train_stage, write_data
from tests.toys import image_sample, write_source

CROPS = 2
ALONE = Place(0, 0, 0, 0, 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Shards, a tokenizer with random weights, and the codes of every picture for 2 crops."""
    path = tmp_path_factory.mktemp("codes")
    write_data(path)
    write_tokenizer(path, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA", str(path))
        recipe, stage = fusion(path, codes=None)
        encoder = load_encoder(recipe, stage, str(path / "run" / "tokenizer"), CROPS, "codes")
        for kind in ("images", "pairs"):
            assert encode_directory(path / kind, encoder, batch=6, workers=0)[1:] == (30, 0, 0)
    return path


@pytest.fixture(autouse=True)
def variables(data, monkeypatch):
    monkeypatch.setenv("DATA", str(data))


def write_tokenizer(path: Path, seed: int) -> None:
    recipe = recipe_of(path)
    stage = recipe.stages["tokenizer"]
    task = build_task(replace(recipe, seed=seed), stage, path)
    torch.nn.init.normal_(task.tokenizer.codebook.vectors)
    config = {"model": to_json(stage.model)}
    write_weights(task.state_dict(), path / "run" / "tokenizer" / "weights.safetensors", config)


def recipe_of(data: Path) -> Recipe:
    return find_recipe(str(data / "recipe.py"))


def fusion(data: Path, codes: str | None, crops: int = CROPS, **changes) -> tuple[Recipe, Stage]:
    """Sources with `crops` looks per picture, and with the stored codes `codes`."""
    recipe = recipe_of(data)
    stage = recipe.stages["fusion"]
    look = {"crops": crops, "codes": codes}
    mix = {kind: source if kind == "texts" else replace(source, **look) for kind, source in stage.mix.items()}
    return recipe, replace(stage, mix=mix, **changes)


def batches(data: Path, recipe: Recipe, stage: Stage, steps: int) -> list[Batch]:
    loader = build_loader(recipe, stage, None, ALONE)
    add = image_targets(recipe, stage, data / "run", torch.device("cpu"))
    return [add(batch) for (batch,) in loader.batches(0, steps)]


def test_batches_and_losses_equal_those_with_online_codes(data):
    online, stored = ((r, s) for r, s in (fusion(data, None), fusion(data, "codes")))
    steps = 20  # across two epoch ends: both looks, and the first again
    task = build_task(*online, data / "run").eval()
    for a, b in zip(batches(data, *online, steps), batches(data, *stored, steps), strict=True):
        assert a.keys == b.keys
        for (name, left), (_, right) in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(left, right), name
        with torch.no_grad():
            assert task(a)["loss"].item() == task(b)["loss"].item()
    assert len(a.image_codes.unique()) > 4  # a constant would be equal too


def test_pictures_have_this_many_looks_and_masks_still_differ(data):
    recipe, stage = fusion(data, None, visual_tokenizer="tokenizer")
    looks: dict[str, list[bytes]] = {}
    masks: dict[str, list[bytes]] = {}
    for batch in batches(data, recipe, stage, 45):  # 30 pictures, 4 per step: six epochs
        for i, key in enumerate(batch.keys[:4]):
            looks.setdefault(key, []).append(batch.images[i].numpy().tobytes())
            masks.setdefault(key, []).append(batch.image_masks[i].numpy().tobytes())
    assert all(len(seen) == 6 and len(set(seen)) == CROPS for seen in looks.values())
    assert all(seen[0::2] == [seen[0]] * 3 and seen[1::2] == [seen[1]] * 3 for seen in looks.values())
    assert sum(len(set(seen)) == 6 for seen in masks.values()) > 20


def test_looks_do_not_depend_on_the_order_of_the_mix(data, tmp_path):
    """The same picture in another source, shard and place has the same looks."""
    recipe = recipe_of(data)
    stage = replace(recipe.stages["vision"], batch=BatchSize(images=6))
    write_source(tmp_path, [[image_sample("other", 99)], [image_sample(f"i0{i}", i) for i in range(6)][::-1]])

    def seen(shards) -> dict[str, bytes]:
        mixed = replace(stage, mix={"images": ImageShards(str(shards), CROPS)})
        loader = build_loader(recipe, mixed, None, ALONE)
        pictures = {}
        for (batch,) in loader.batches(0, loader.samples["images"] // 6):
            pictures |= {k.split("/")[-1]: p.numpy().tobytes() for k, p in zip(batch.keys, batch.images, strict=True)}
        return pictures

    here, there = seen(data / "images"), seen(tmp_path)
    common = here.keys() & there.keys()
    assert len(common) >= 5 and all(here[key] == there[key] for key in common)


def test_a_kind_without_stored_codes_gets_them_online(data):
    recipe, stage = fusion(data, "codes")
    mixed = replace(stage, mix=stage.mix | {"pairs": replace(stage.mix["pairs"], codes=None)})
    for a, b in zip(batches(data, *fusion(data, None), 3), batches(data, recipe, mixed, 3), strict=True):
        assert torch.equal(a.image_codes, b.image_codes)


def test_the_tokenizer_is_not_run_where_codes_are_stored(data, monkeypatch):
    door = "pretrain.run.image_targets.load_visual_tokenizer"
    monkeypatch.setattr(door, lambda *_: pytest.fail("the tokenizer was loaded"))
    assert batches(data, *fusion(data, "codes"), 2)[0].image_codes.shape == (8, 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crops": 4}, r"mix\.images\.codes: the stored codes have crops=2 \(this run has 4\)"),
        ({"transform": 0.2}, r"transform\.jitter=0\.1 \(this run has 0\.2\)"),
        ({"seed": 7}, r"seed=0 \(this run has 7\)"),
        ({"codes": "codes-b"}, r"cannot read .*codes-b\.json"),
        ({"tokenizer": 9}, r"mix\.\w+\.codes=codes: the stored codes are of the visual tokenizer \w+, but .* is \w+"),
    ],
)
def test_other_codes_are_refused_before_training(data, changes, message):
    recipe, stage = fusion(data, changes.get("codes", "codes"), crops=changes.get("crops", CROPS))
    if "transform" in changes:
        stage = replace(stage, transform=replace(stage.transform, jitter=changes["transform"]))
    if "seed" in changes:
        recipe = replace(recipe, seed=changes["seed"])
    run = data / "run"
    if "tokenizer" in changes:
        (data / "other" / "run").mkdir(parents=True)
        (data / "other" / "recipe.py").write_text((data / "recipe.py").read_text())
        write_tokenizer(data / "other", changes["tokenizer"])
        run = data / "other" / "run"
    starts = (
        lambda: build_loader(recipe, stage, None, ALONE),
        lambda: image_targets(recipe, stage, run, torch.device("cpu")),
    )
    with pytest.raises(ValueError, match=message):
        [start() for start in starts]


def test_codes_need_crops():
    with pytest.raises(ValueError, match="but crops=0; set crops"):
        ImageShards("x", codes="codes")
    with pytest.raises(ValueError, match="not a valid name of stored codes"):
        ImageShards("x", crops=1, codes="../../etc/passwd")


def stored(directory: Path, picture_less: bool = False) -> tuple[StoredCodes, Path]:
    """Codes sample * 100 + crop * 10 + patch of one shard of 3 samples."""
    write_source(directory, [[image_sample(f"k{i}", i) for i in range(3)]])
    reader = ShardReader(load_manifest(str(directory)))
    coding = Coding("t", {"size": 16}, 0, CROPS, 4)
    codes = np.add.outer(np.add.outer(np.arange(3) * 100, np.arange(CROPS) * 10), np.arange(4)).astype("<u2")
    if picture_less:
        codes[1] = 0xFFFF
    (directory / "00000.codes").write_bytes(file_heads(coding, reader.index(0))[0] + codes.tobytes())
    summary = {"version": 1, "coding": vars(coding), "shards": {"00000.tar": 3}}
    (directory / "codes.json").write_text(json.dumps(summary))
    return StoredCodes(reader, "codes"), directory / "00000.codes"


def test_codes_are_read_by_place(tmp_path):
    codes, _ = stored(tmp_path)
    assert codes.read(0, 2, 1).tolist() == [210, 211, 212, 213]
    again = pickle.loads(pickle.dumps(codes))
    assert again.read(0, 0, 1).tolist() == [10, 11, 12, 13] and again.read(0, 0, 1).dtype == np.int64


def test_codes_that_were_stored_when_indexes_had_no_checksums_are_read(tmp_path):
    codes, path = stored(tmp_path)
    new, old = file_heads(codes.coding, ShardReader(load_manifest(str(tmp_path))).index(0))
    path.write_bytes(path.read_bytes().replace(new, old))
    assert codes.read(0, 2, 1).tolist() == [210, 211, 212, 213]


def test_codes_of_remote_shards_come_through_the_cache(tmp_path):
    stored(tmp_path)
    manifest = load_manifest(f"pipe:cat {tmp_path}/00000.tar")
    codes = StoredCodes(ShardReader(manifest, tmp_path / "cache"), "codes")
    assert codes.read(0, 2, 1).tolist() == [210, 211, 212, 213]
    (tmp_path / "00000.codes").unlink()  # it is read only once
    assert codes.read(0, 1, 0).tolist() == [100, 101, 102, 103]


def test_a_picture_without_codes_is_a_bad_sample(tmp_path):
    codes, _ = stored(tmp_path, picture_less=True)
    assert codes.read(0, 0, 0).tolist() == [0, 1, 2, 3]
    with pytest.raises(BadSample, match="could not be decoded"):
        codes.read(0, 1, 0)


@pytest.mark.parametrize("damage", ["cut", "head", "gone", "shard"])
def test_damaged_files_are_named(tmp_path, damage):
    codes, path = stored(tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "head":
        path.write_bytes(path.read_bytes().replace(b'"crops": 2', b'"crops": 3'))
    elif damage == "gone":
        path.unlink()
    else:  # rewritten with other keys, but the same number
        write_source(tmp_path, [[image_sample(f"z{i}", i) for i in range(3)]])
        codes = StoredCodes(ShardReader(load_manifest(str(tmp_path))), "codes")
    with pytest.raises(ShardError, match=r"cannot (use|read) .*00000\.codes"):
        codes.read(0, 0, 0)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2}', '{"version": 1, "coding": {"seed": 0}, "shards": {}}']
)
def test_a_damaged_summary_is_one_sentence(tmp_path, text):
    stored(tmp_path)
    (tmp_path / "codes.json").write_text(text)
    with pytest.raises(ValueError, match=r"codes\.json cannot be used"):
        StoredCodes(ShardReader(load_manifest(str(tmp_path))), "codes")


@pytest.mark.slow
def test_a_run_with_stored_codes_equals_one_with_online_codes(data, tmp_path):
    (tmp_path / "tokenizer").symlink_to(data / "run" / "tokenizer")
    lines = {}
    for name, codes in (("online", "null"), ("stored", "codes")):
        sets = [f"mix.{kind}.{key}" for kind in ("images", "pairs") for key in (f"crops={CROPS}", f"codes={codes}")]
        where = tmp_path / name
        where.mkdir()
        (where / "tokenizer").symlink_to(data / "run" / "tokenizer")
        done = train_stage(data, where, "fusion", "steps=3", *sets)
        assert done.returncode == 0, done.stderr
        steps = [json.loads(line) for line in (where / "fusion" / "metrics.jsonl").read_text().splitlines()]
        lines[name] = [{k: v for k, v in step.items() if k.startswith(("loss", "acc", "grad"))} for step in steps]
    assert len(lines["online"]) == 3 and lines["online"] == lines["stored"]
