"""The sample corpus: its shards are img2dataset's, its held-out combinations are held out, its captions are exact."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from pyarrow import parquet

from data_tools import sample_corpus
from data_tools.drawn import pairs as drawn_pairs
from data_tools.drawn.captions import describe, is_true
from data_tools.drawn.pairs import distinguishable, pair
from data_tools.drawn.scenes import COLOURS, HELD_OUT, SHAPES, draw_scene, random_scene
from data_tools.sample_corpus import Corpus, main, write_corpus
from tests.toys import read_members, refused

SMALL = Corpus(pairs=250, images=60, texts=150, held_out=48, samples_per_shard=100, familiar=12)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "corpus"
    assert write_corpus(out, SMALL, workers=1)
    return out


def members(directory: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    for name, data in read_members(directory).items():
        key, extension = name.split(".")
        samples.setdefault(key, {})[extension] = data
    return samples


def combinations(directory: Path) -> list[set[tuple[str, str]]]:
    """The (colour, shape) of the things of each scene."""
    facts = [json.loads(sample["json"]) for sample in members(directory).values()]
    return [{(t["colour"], t["shape"]) for t in scene["things"]} for fact in facts for scene in fact["scenes"]]


@pytest.mark.parametrize(
    ("kind", "extensions"),
    [("pairs", {"jpg", "txt", "json"}), ("images", {"jpg", "json"}), ("texts", {"txt", "json"})],
)
def test_shards_are_as_img2dataset_writes_them(corpus, kind, extensions):
    for split in ("train", "heldout"):
        directory = corpus / kind / split
        samples = members(directory)
        assert len(samples) == SMALL.count(kind, split)
        counted = 0
        for tar in sorted(directory.glob("*.tar")):
            stats = json.loads(tar.with_name(f"{tar.stem}_stats.json").read_text())
            rows = parquet.read_table(tar.with_suffix(".parquet")).to_pylist()
            assert stats["successes"] == stats["count"] == len(rows) == stats["status_dict"]["success"]
            assert all(row["key"].startswith(tar.stem) and row["status"] == "success" for row in rows)
            counted += len(rows)
        assert counted == len(samples)
        for key, sample in samples.items():
            assert set(sample) == extensions
            facts = json.loads(sample["json"])
            assert facts["key"] == key
            assert facts["caption"] == (sample["txt"].decode() if "txt" in sample else None)
            if "jpg" in sample:
                assert Image.open(io.BytesIO(sample["jpg"])).size == (64, 64)


def test_combinations_are_held_out_and_their_parts_are_not(corpus):
    for kind in sample_corpus.KINDS:
        training = combinations(corpus / kind / "train")
        assert not any(scene & HELD_OUT for scene in training)
        assert all(scene & HELD_OUT for scene in combinations(corpus / kind / "heldout"))
        seen = set.union(*training)
        assert {colour for colour, _ in seen} == set(COLOURS)
        assert {shape for _, shape in seen} == set(SHAPES)


def test_familiar_pairs_are_new_pictures_of_known_combinations(corpus):
    familiar = members(corpus / "pairs/familiar")
    assert len(familiar) == SMALL.familiar and not (corpus / "images/familiar").exists()
    assert not any(scene & HELD_OUT for scene in combinations(corpus / "pairs/familiar"))
    known = {sample["jpg"] for sample in members(corpus / "pairs/train").values()}
    assert not any(sample["jpg"] in known for sample in familiar.values())


def test_a_corpus_of_before_gets_its_familiar_pairs(tmp_path):
    """And nothing else of it changes."""
    old, stamp = Corpus(pairs=3, images=0, texts=0, held_out=2, familiar=0), tmp_path / sample_corpus.STAMP
    write_corpus(tmp_path, old, workers=1)
    content = json.loads(stamp.read_text())
    del content["familiar"]
    stamp.write_text(json.dumps(content))
    tars = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*.tar")}
    now = replace(old, familiar=Corpus.familiar)
    assert write_corpus(tmp_path, now, workers=1) and not write_corpus(tmp_path, now, workers=1)
    assert len(members(tmp_path / "pairs/familiar")) == 256
    assert tars == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tars}


def test_training_texts_do_not_mention_held_out_combinations(corpus):
    texts = [
        sample["txt"].decode().lower()
        for kind in ("pairs", "texts")
        for sample in members(corpus / kind / "train").values()
    ]
    assert not [text for text in texts for colour, shape in HELD_OUT if f"{colour} {shape}" in text]


def test_no_held_out_caption_fits_another_picture():
    chosen = [pair(0, "heldout", number) for number in distinguishable(0, 300)]
    assert len({caption for _, caption, _, _ in chosen}) == 300
    for i, (scene, caption, claim, _) in enumerate(chosen):
        fitting = [j for j, (other, *_) in enumerate(chosen) if is_true(claim, other)]
        assert fitting == [i], (caption, scene)


def test_a_claim_is_true_of_its_scene_and_false_when_a_fact_changes():
    rng = random.Random(0)
    for _ in range(300):
        scene = random_scene(rng, held_out=False)
        caption, claim = describe(scene, rng)
        assert is_true(claim, scene), caption
        assert scene.background in caption
        assert all(f"{thing.colour} {thing.shape}" in caption for thing in scene.things)
        assert 6 <= len(caption.split()) <= 18
        assert not is_true(claim, replace(scene, background="green"))
        first = scene.things[0]
        for changed in (replace(first, colour="white"), replace(first, shape="heart")):
            assert not is_true(claim, replace(scene, things=(changed, *scene.things[1:])))
        mirrored = tuple(replace(thing, x=1 - thing.x, y=1 - thing.y) for thing in scene.things)
        if len(scene.things) > 1:
            assert not is_true(claim, replace(scene, things=mirrored)), caption


def test_pictures_match_their_facts():
    """The colour at a thing's centre (of a ring: on its band) is closest to the colour in its facts."""
    rng = random.Random(1)
    for _ in range(100):
        scene = random_scene(rng, held_out=False)
        picture = draw_scene(scene, 64, rng)
        for thing in scene.things:
            assert thing.width * 64 >= 14
            for edge in (thing.x - thing.width / 2, thing.y - thing.width / 2):
                assert edge >= 0 and edge + thing.width <= 1
            if thing.texture != "plain" or thing.shape == "ring":
                continue
            pixel = picture.getpixel((int(thing.x * 64), int(thing.y * 64)))
            nearest = min(
                COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], pixel, strict=True))
            )
            assert nearest == thing.colour, (scene, pixel)


def test_things_do_not_touch():
    rng = random.Random(2)
    for _ in range(1000):
        things = random_scene(rng, held_out=True).things
        for i, a in enumerate(things):
            for b in things[:i]:
                assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.width + b.width) / 2 + 1 / 64, (a, b)


def test_the_seed_determines_the_bytes_for_any_number_of_workers(corpus, tmp_path):
    write_corpus(tmp_path / "again", SMALL, workers=2)
    for kind in sample_corpus.KINDS:
        for path in (corpus / kind).rglob("*.tar"):
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(corpus)).read_bytes()
    tiny = {"pairs": 5, "images": 0, "texts": 0, "held_out": 0, "familiar": 0}
    write_corpus(tmp_path / "a", Corpus(**tiny), workers=1)
    write_corpus(tmp_path / "b", Corpus(**tiny, seed=1), workers=1)
    a, b = (members(tmp_path / name / "pairs" / "train") for name in "ab")
    assert all(a[key]["jpg"] != b[key]["jpg"] for key in a)


def test_a_second_call_writes_only_what_is_missing(corpus, tmp_path):
    assert not write_corpus(corpus, SMALL, workers=1)
    tiny, out = Corpus(pairs=25, images=0, texts=5, held_out=12, samples_per_shard=10, familiar=4), tmp_path / "corpus"
    out.mkdir()
    (out / ".corpus.json.1234.writing").touch()  # as after a kill at the very beginning
    write_corpus(out, tiny, workers=1)
    tars = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*.tar")}
    # As after a killed run: a tar without statistics.
    broken = out / "pairs" / "train" / "00001.tar"
    broken.write_bytes(broken.read_bytes()[:700])
    (out / "pairs" / "train" / "00001_stats.json").unlink()
    assert write_corpus(out, tiny, workers=1)
    for path, (data, changed) in tars.items():
        assert path.read_bytes() == data
        assert path == broken or path.stat().st_mtime_ns == changed


def test_user_errors_are_one_sentence_and_code_2(tmp_path, capsys):
    out = tmp_path / "corpus"
    arguments = f"--out {out} --pairs 3 --images 0 --texts 0 --held-out 2 --workers 1".split()
    assert main(arguments) == 0
    error = refused(capsys, main, *arguments, "--seed", "3")
    assert "seed=0" in error and "--overwrite" in error
    assert main([*arguments, "--seed", "3", "--overwrite"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    assert main(["--out", str(tmp_path / "mine"), "--overwrite"]) == 2
    assert (tmp_path / "mine" / "thesis.tex").exists()
    for wrong, name in [("--pairs", "pairs=-1"), ("--size", "size=-1"), ("--workers", "workers=-1")]:
        assert refused(capsys, main, *arguments, wrong, "-1").startswith(f"error: {name}")


def test_too_many_held_out_pairs_are_refused(monkeypatch):
    monkeypatch.setattr(drawn_pairs, "MAX_CLASHES", 1)
    with pytest.raises(ValueError, match="held_out=400 is too large"):
        distinguishable(0, 400)
