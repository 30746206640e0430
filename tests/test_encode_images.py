"""Stored codes: resumed, or shared between machines, the tool writes what one run writes; mistakes are one line."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain import encode_images
from pretrain.data import pool
from pretrain.data.codes import NO_CODE, Coding, StoredCodes, look_rng, plain
from pretrain.data.shards.reader import ShardReader, load_manifest
from pretrain.data.transforms import ImageTransform
from pretrain.encode_images import Encoder, encode_directory, main
from pretrain.models.visual_tokenizer.vqkd import VQKD, VQKDConfig
from tests.small_run import RECIPE
from tests.toys import image_sample, refused, text_sample, write_source

LOOK = ImageTransform(size=16, scale=(0.8, 1.0), jitter=0.1)
CFG = VQKDConfig(
    dim=16, depth=1, heads=2, decoder_depth=0, image_size=16, patch_size=4, codes=16, code_dim=4, target_dim=48
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    torch.manual_seed(0)
    tokenizer = VQKD(CFG)
    torch.nn.init.normal_(tokenizer.codebook.vectors)
    return Encoder(tokenizer, LOOK, Coding("t", plain(LOOK), 5, 3, CFG.patches), "codes")


@pytest.fixture
def shards(tmp_path) -> Path:
    """Shards of 5, 0 and 4 pictures, of which one cannot be decoded."""
    broken = {"key": "broken", "jpg": b"no picture"}
    first = [image_sample(f"a{i}", i) for i in range(4)]
    return write_source(
        tmp_path / "shards", [[*first[:2], broken, *first[2:]], [], [image_sample(f"b{i}", i) for i in range(4)]]
    )


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*codes*")}


def test_codes_are_those_of_the_looks(shards, encoder):
    assert encode_directory(shards, encoder, batch=7, workers=0) == (3, 9, 1, 0)
    reader = ShardReader(load_manifest(str(shards)))
    stored = StoredCodes(reader, "codes")
    for shard, sample in [(0, 0), (0, 4), (2, 1)]:
        members = reader.read(shard, sample)
        for look in range(3):
            pixels = LOOK(members["jpg"], look_rng(5, members["__key__"], look))
            wanted = encoder.tokenizer.encode(torch.from_numpy(pixels)[None])[0]
            assert np.array_equal(stored.read(shard, sample, look), wanted.numpy())
    body = np.frombuffer((shards / "00000.codes").read_bytes().split(b"\n", 1)[1], "<u2").reshape(5, 3, 16)
    assert (body[2] == NO_CODE).all() and (np.delete(body, 2, axis=0) < 16).all()


def test_workers_batches_and_parts_change_nothing(shards, encoder, tmp_path):
    encode_directory(shards, encoder, workers=0)
    whole = files(shards)
    for path in shards.glob("*codes*"):
        path.unlink()
    assert encode_directory(shards, encoder, part=1, parts=2, batch=1, workers=2).remaining == 2
    assert "codes.json" not in files(shards)
    assert encode_directory(shards, encoder, part=0, parts=2, batch=4, workers=1).remaining == 0
    assert files(shards) == whole


def test_a_worker_that_is_killed_or_hangs_is_replaced(shards, encoder, tmp_path, monkeypatch, caplog):
    encode_directory(shards, encoder, workers=0)
    whole = files(shards)
    for path in shards.glob("*codes*"):
        path.unlink()
    monkeypatch.setattr(pool, "HANG_S", 0.5)
    monkeypatch.setattr(pool, "TICK_S", 0.05)
    killed, hung, make = tmp_path / "killed", tmp_path / "hung", encode_images._Looks.make

    def fails_once(self, item, pictures):
        if item == (0, 0) and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == (2, 0) and not hung.exists():
            hung.touch()
            signal.pause()
        return make(self, item, pictures)

    monkeypatch.setattr(encode_images._Looks, "make", fails_once)
    assert encode_directory(shards, encoder, batch=7, workers=2) == (3, 9, 1, 0)
    assert files(shards) == whole and not multiprocessing.active_children()
    assert "is killed by SIGKILL; another one" in caplog.text and "hangs: no sign of life" in caplog.text


def test_what_is_done_is_kept_and_what_is_damaged_is_made_again(shards, encoder):
    encode_directory(shards, encoder, workers=0)
    whole = files(shards)
    assert encode_directory(shards, encoder, workers=0).shards == 0
    (shards / "00000.codes").write_bytes(whole["00000.codes"][:-1])
    (shards / "codes.json").unlink()  # as a kill leaves it
    assert encode_directory(shards, encoder, workers=0)[:2] == (1, 5)
    assert files(shards) == whole


def test_a_read_only_data_set_names_the_way_out_unless_all_is_done(shards, encoder, monkeypatch):
    denied = "pretrain.data.shards.indexing.os.access"
    with monkeypatch.context() as patch:
        patch.setattr(denied, lambda *_: False)
        with pytest.raises(ValueError, match=r"cannot be written to, .*ln -s .*/shards/\*"):
            encode_directory(shards, encoder, workers=0)
    assert not files(shards)
    encode_directory(shards, encoder, workers=0)
    monkeypatch.setattr(denied, lambda *_: False)
    assert encode_directory(shards, encoder, workers=0).shards == 0


def test_other_codes_of_the_same_name_are_not_overwritten(shards, encoder):
    encode_directory(shards, encoder, workers=0)
    before = files(shards)
    other = encoder._replace(coding=replace(encoder.coding, seed=6))
    with pytest.raises(ValueError, match=r"seed=5 \(this call has 6\); choose another --name"):
        encode_directory(shards, other, workers=0)
    assert files(shards) == before
    encode_directory(shards, other._replace(name="codes-six"), workers=0)
    six = {*(f"0000{n}.codes-six" for n in range(3)), "codes-six.json"}
    assert files(shards).keys() - before.keys() == six


@pytest.mark.parametrize("workers", [0, 1])
def test_texts_are_no_pictures(tmp_path, encoder, workers):
    texts = write_source(tmp_path / "texts", [[text_sample("t", "words")]])
    with pytest.raises(ValueError, match=r"none of the 1 samples of .* has a picture"):
        encode_directory(texts, encoder, workers=workers)
    assert not files(texts)


def test_a_shard_that_changes_meanwhile_is_one_sentence_from_a_worker_too(shards, encoder, monkeypatch):
    monkeypatch.setattr(encode_images, "index_directory", lambda directory: None)
    tar = shards / "00002.tar"
    tar.write_bytes(tar.read_bytes().replace(b"JFIF", b"JFIX"))
    with pytest.raises(ValueError, match=r"00002\.tar was changed after indexing or is damaged") as caught:
        encode_directory(shards, encoder, workers=1)
    assert "Traceback" not in str(caught.value)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--crops", "0"], "--crops 0 is below 1"),
        (["--stage", "tokenizer"], "names a stage that predicts no codes"),
        (["--stage", "fussion"], "did you mean fusion?"),
        (["--tokenizer", "nowhere"], "run the stage 'nowhere' to its end first"),
        (["--name", "../x"], "not a valid name of stored codes"),
        (["--part", "2/2"], "--part 2/2 is wrong"),
        (["--batch", "0"], "--batch 0"),
        (["--set", "transform.train=false"], "transform.train=False"),
        (["--set", "transform.jiter=0"], "did you mean jitter?"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, capsys, change, message):
    (tmp_path / "recipe.py").write_text(RECIPE)
    line = ["--tokenizer", str(tmp_path), "--crops", "2", "--recipe", str(tmp_path / "recipe.py"), "--stage", "fusion"]
    assert message in refused(capsys, main, tmp_path, *line, *change)


def test_the_command_says_what_to_set(shards, tmp_path, monkeypatch, capsys, encoder):
    monkeypatch.setattr(encode_images, "load_encoder", lambda *_: encoder)
    (tmp_path / "recipe.py").write_text(RECIPE)
    recipe = str(tmp_path / "recipe.py")
    line = [str(shards), "--tokenizer", "t", "--crops", "3", "--recipe", recipe, "--stage", "fusion", "--workers", "0"]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "9 pictures in 3 shards encoded, 1 of them cannot be decoded" in out and "crops=3, codes='codes'" in out
    counts = json.loads((shards / "codes.json").read_text())["shards"]
    assert counts == {"00000.tar": 5, "00001.tar": 0, "00002.tar": 4}
