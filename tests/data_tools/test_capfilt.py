"""data_tools.capfilt: what the captioner writes and the filter lets stay, in shards, whatever the parts and kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import pretrain
from data_tools.capfilt import main
from data_tools.pictures.caption_shard import MAX_WEB, counts_path, web_texts
from data_tools.shards.steps import Step, read_drops, read_steps, write_step
from pretrain.checkpoint.weights import WEIGHTS, write_weights
from pretrain.config import to_json
from pretrain.data.sources import CaptionShards
from pretrain.data.transforms import sample_rng
from pretrain.models.decoder.encoder_decoder import EncoderDecoder
from pretrain.models.generation import Writing
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.matching import Matching
from pretrain.tasks.pretrain import PretrainTask
from tests.small_run import ROOT, environment
from tests.toys import index_source, pair_sample, read_all, refused, wait_for, write_source, write_text_model

LINES = [f"a {size} {colour} {shape}" for size in ("big", "small") for colour in ("red", "green", "blue")
         for shape in ("dog", "cat")]  # fmt: skip
MODEL = EncoderDecoder(
    dim=16, heads=2, ffn_dim=32, image_depth=1, text_depth=1, image_size=32, patch_size=8, vocab_size=70,
    max_text_len=16, init_std=0.3,
)  # fmt: skip
WORDS = 8


class World(NamedTuple):
    weights: Path
    shards: Path
    threshold: float  # near the middle of the probabilities


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    place = tmp_path_factory.mktemp("capfilt")
    (place / "weights").mkdir()
    write_text_model(place / "weights/text.model", LINES, 60)
    torch.manual_seed(0)
    task = PretrainTask(MODEL, (), (Contrastive(8), Matching(), Captioning(tied_text_head=True, transform=True)))
    with torch.no_grad():
        for value in task.parameters():
            value.add_(torch.randn_like(value) * 0.3)
    state = {name: value for name, value in task.state_dict().items() if name != "objectives.captioning.words.weight"}
    write_weights(state, place / "weights" / WEIGHTS, {"model": to_json(MODEL)})
    shards = [[pair_sample(f"{s}{i}", 10 * s + i, LINES[4 * s + i]) for i in range(4)] for s in range(3)]
    shards[0][1]["jpg"] = b"no picture"
    del shards[1][2]["txt"]
    shards[2][0]["json"] = json.dumps({"captions": [LINES[0], LINES[1], " "], "url": "x"}).encode()
    write_source(place / "shards", shards)
    index_source(place / "shards")
    write_step(place / "shards", "download", Step("data_tools.download", 20, 12, {"dns": 8}, unit="rows"))
    model = pretrain.load(place / "weights")
    looks = [sample["jpg"] for shard in shards for sample in shard if sample["jpg"] != b"no picture"]
    matches = model.score_pairs(looks, [LINES[n] for n in range(len(looks))])
    return World(place / "weights", place / "shards", matches.median().item())


def line(world: World, out: Path, *more: str) -> list[str]:
    both = ["--captioner", str(world.weights), "--filter", str(world.weights), "--max-words", str(WORDS)]
    least = [f"--min-web={world.threshold}", f"--min-written={world.threshold}", "--seed", "3", "--batch", "3"]
    return [str(world.shards), *both, *least, "--out", str(out), *more]


def tars(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}


def test_each_text_is_judged_and_accounted_for(world, tmp_path, capsys):
    assert main(line(world, tmp_path / "out")) == 0
    assert "samples in" in capsys.readouterr().out
    model = pretrain.load(world.weights)
    stayed = {each["__key__"].decode(): each for each in read_all(tmp_path / "out")}
    report = json.loads((tmp_path / "out/report.json").read_text())
    counts: dict[str, dict[str, int]] = {"web": {}, "written": {}}
    how = Writing(1, 1.0, 0.9, 1.0, WORDS)
    for number, shard in enumerate(_by_shard(world)):
        for place, sample in enumerate(shard):
            if sample["jpg"] == b"no picture":
                continue
            draws = torch.from_numpy(np.stack([sample_rng(3, number, place).random(WORDS)]))
            written = model.caption_looks(model.look(sample["jpg"])[None], how, draws)[0].strip()
            texts = [("web", text) for text in web_texts(sample)] + [("written", written)]
            kept = []
            for origin, text in texts:
                good = bool(text) and model.score_pairs([sample["jpg"]], [text])[0].item() >= world.threshold
                same = origin == "written" and text in web_texts(sample)
                reason = "same_as_web" if same else "kept" if good else "unmatched" if text else "empty"
                counts[origin][reason] = counts[origin].get(reason, 0) + 1
                kept += [text] if reason == "kept" else []
            if not web_texts(sample):
                counts["web"]["missing"] = counts["web"].get("missing", 0) + 1
            new = stayed.pop(sample["__key__"].decode(), None)
            assert (new is not None) == bool(kept)
            if new is not None:
                facts = json.loads(new["json"])
                assert facts["captions"] == kept and new["txt"].decode() == kept[0] and new["jpg"] == sample["jpg"]
                assert [each["text"] for each in facts["capfilt"]] == [text for _, text in texts if text]
                before = json.loads(sample.get("json", b"{}"))
                assert {name: value for name, value in facts.items() if name in before} == before | (
                    {"captions": kept} if "captions" in before else {}
                )
    assert not stayed
    assert report["texts"] == counts and counts["web"]["kept"] and counts["written"]["kept"]
    steps = read_steps(tmp_path / "out")
    assert list(steps) == ["download", "capfilt"]  # the audit shows how the input came about
    step = steps["capfilt"]
    assert step.rows == 12 and step.kept == report["kept"] and step.dropped["undecodable"] == 1
    drops = list(read_drops([tmp_path / "out/steps/capfilt.parquet"]))
    assert len(drops) == 12 - step.kept and {drop.reason for drop in drops} == set(step.dropped)
    assert CaptionShards(str(tmp_path / "out"), text_len=16).wanted  # and its samples have what it reads


def _by_shard(world: World) -> list[list[dict[str, bytes]]]:
    samples = read_all(world.shards)
    return [[each for each in samples if each["__key__"].decode()[0] == str(number)] for number in range(3)]


def test_parts_give_the_same_bytes_and_a_second_call_ends_at_once(world, tmp_path, capsys):
    assert main(line(world, tmp_path / "whole")) == 0
    assert main(line(world, tmp_path / "parts", "--part", "1/2")) == 0
    assert "1 of 3 shards are finished" in capsys.readouterr().out
    assert not (tmp_path / "parts/manifest.json").exists()
    assert main(line(world, tmp_path / "parts", "--part", "0/2", "--workers", "2")) == 0
    assert tars(tmp_path / "parts") == tars(tmp_path / "whole") != {}
    assert main(line(world, tmp_path / "parts")) == 0
    for name in ("report.json", "manifest.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    other = line(world, tmp_path / "parts")
    other[other.index("--seed") + 1] = "4"
    assert "has the results of other seed" in refused(capsys, main, *other)


def test_a_killed_run_goes_on_to_the_same_bytes(world, tmp_path):
    assert main(line(world, tmp_path / "whole")) == 0
    out = tmp_path / "out"
    command = [sys.executable, "-m", "data_tools.capfilt", *line(world, out)]
    running = subprocess.Popen(command, env=environment(tmp_path), cwd=ROOT, start_new_session=True)
    wait_for(lambda: counts_path(out, 0).is_file() or running.poll() is not None, 100)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    # As if the kill had come between a shard and its counts.
    counts_path(out, 0).unlink()
    assert main(line(world, out)) == 0
    assert tars(out) == tars(tmp_path / "whole")
    assert (out / "report.json").read_bytes() == (tmp_path / "whole/report.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("--min-web", "1.5"), "--min-web 1.5 is no probability; use 0 to 1"),
        (("--batch", "0"), "--batch 0 is below 1"),
        (("--seed", "-1"), "--seed -1 is negative"),
        (("--top-p", "2"), "top_p=2.0 is no share"),
        (("--part", "2/2"), "--part 2/2 is wrong"),
        (("--captioner", "nowhere"), "--captioner nowhere does not exist"),
        (("--min-web=1", "--min-written=1"), "no text of the 12 samples"),
    ],
)
def test_what_it_refuses(change, said, world, tmp_path, capsys):
    assert said in refused(capsys, main, *line(world, tmp_path / "out"), *change)


def test_weights_without_a_head_and_places_that_are_taken_are_refused(world, tmp_path, capsys):
    task = PretrainTask(MODEL, (), (Contrastive(8),))
    write_weights(task.state_dict(), tmp_path / "plain" / WEIGHTS, {"model": to_json(MODEL)})
    (tmp_path / "plain/text.model").write_bytes((world.weights / "text.model").read_bytes())
    plain = str(tmp_path / "plain")
    said = refused(capsys, main, *line(world, tmp_path / "out"), "--filter", plain)
    assert f"--filter {plain} has no head of matching" in said
    said = refused(capsys, main, *line(world, tmp_path / "out"), "--captioner", plain)
    assert f"--captioner {plain}: these weights have no masked head" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/note.txt").write_text("mine")
    assert "contains other files" in refused(capsys, main, *line(world, tmp_path / "full"))
    assert "index its shards first" in refused(capsys, main, *line(world._replace(shards=tmp_path), tmp_path / "out"))


def test_a_hostile_list_of_captions_is_cut():
    members = {"json": json.dumps({"captions": [f"text {n}" for n in range(1000)]}).encode()}
    assert len(web_texts(members)) == MAX_WEB
    assert web_texts({"json": b'{"captions": [1]}', "txt": b" a dog "}) == ["a dog"]
    assert web_texts({"json": b"[[[", "txt": b"\xff"}) == []
    assert web_texts({"json": b'{"captions": []}', "txt": b"a dog"}) == ["a dog"]
