"""data_tools.leaks: planted pictures and captions are found in each form, unrelated ones are not."""

from __future__ import annotations

import json
import os

import pytest

from data_tools.leaks import main
from data_tools.shards.steps import Drop, read_drops, read_steps
from tests import toys
from tests.data_tools.pictures import COPIES, mirrored, scenes, write_shard
from tests.toys import encoded, refused

LONG = "a small dog sleeps under the kitchen table"
EVAL = 12  # evaluation pictures; also the seed to draw them


def drops(directory) -> dict[str, Drop]:
    return {drop.key: drop for drop in read_drops([directory / "drops" / "leaks.parquet"])}


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures in two folders, one with a caption beside it, and two other files."""
    path = tmp_path / "eval"
    for number, picture in enumerate(scenes(EVAL, seed=EVAL)):
        file = path / ("a" if number % 2 else "b/c") / f"pic{number:02d}.{'png' if number % 3 else 'jpg'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(picture, "PNG" if number % 3 else "JPEG"))
    (path / "a" / "pic01.txt").write_text(f"{LONG}\na dog\n")
    (path / "a" / "notes.md").write_text("no picture")
    (path / "a" / "broken.jpg").write_bytes(b"<html>")
    return path


def test_planted_pictures_are_found_and_others_are_not(folder, tmp_path, capsys):
    copies = [*COPIES.values(), lambda image: encoded(mirrored(image), quality=60)]
    planted = [(f"leak{n:02d}", copy(scenes(EVAL, seed=EVAL)[n]), None) for n, copy in enumerate(copies)]
    planted.append(("same", (folder / "b/c/pic00.jpg").read_bytes(), "short"))
    others = [(f"own{n:03d}", encoded(picture), f"scene {n}") for n, picture in enumerate(scenes(150, 64, seed=99))]
    write_shard(tmp_path / "train", 0, [*others[:75], *planted])
    write_shard(tmp_path / "train", 1, others[75:])
    assert main([str(tmp_path / "train"), "--against", f"coco={folder}", "--workers", "2"]) == 0
    dropped = drops(tmp_path / "train")
    leaked = {key for key in dropped if not key.startswith("own")}
    assert leaked == {sample[0] for sample in planted}
    assert len(dropped) - len(leaked) <= 3  # 2 % of scenes, which look very similar
    assert {drop.reason for drop in dropped.values()} == {"leak:coco:picture"}
    assert dropped["leak10"].detail.startswith("a/pic10.png") or "mirrored" in dropped["leak10"].detail
    assert dropped["same"].detail == "b/c/pic00.jpg equal bytes"
    step = read_steps(tmp_path / "train")["leaks"]
    assert step.rows == 162 and step.dropped == {"leak:coco:picture": len(dropped)}
    captured = capsys.readouterr()
    assert "12 of them" not in captured.out and "coco: 13 pictures" in captured.out and "1 damaged" in captured.out
    assert "broken.jpg: not a readable JPEG" in captured.err
    assert not list(folder.rglob("*.parquet")), "an evaluation set is never written to"


def test_captions_are_found_if_they_are_long_enough(folder, tmp_path):
    captions = {"a": f"  {LONG.upper()}!", "b": "A dog", "c": LONG + " again", "d": None}
    write_shard(tmp_path / "train", 0, [(key, None, caption) for key, caption in captions.items()])
    arguments = [str(tmp_path / "train"), "--against", f"coco={folder}"]
    assert main(arguments) == 0
    assert {key: drop.reason for key, drop in drops(tmp_path / "train").items()} == {"a": "leak:coco:caption"}
    assert main([*arguments, "--caption-words", "2"]) == 0
    assert set(drops(tmp_path / "train")) == {"a", "b"}
    assert main([*arguments, "--caption-words", "0"]) == 0
    assert not drops(tmp_path / "train")


def test_every_caption_of_a_sample_is_compared_in_training_and_in_evaluation_shards(tmp_path):
    """Not only the txt, which is the first of them: CaptionShards reads all."""
    texts = [f"the {number} of five sentences about a sleeping dog" for number in ("first", "second", "third", "last")]
    told = [{"key": "e", "txt": texts[0], "json": json.dumps({"captions": texts[:3]}).encode()}]
    toys.write_shard(tmp_path / "eval", 0, told)
    samples = [
        {"key": "a", "txt": "my own", "json": json.dumps({"captions": ["my own", texts[0]]}).encode()},
        {"key": "b", "txt": texts[2], "json": b"no json"},
        {"key": "c", "json": json.dumps({"captions": [None, texts[1].upper(), 7]}).encode()},
        {"key": "d", "txt": texts[3], "json": json.dumps({"captions": texts[3]}).encode()},
        {"key": "e", "txt": "short", "json": json.dumps([texts[0]]).encode()},
    ]
    toys.write_shard(tmp_path / "train", 0, samples)
    assert main([str(tmp_path / "train"), "--against", f"coco={tmp_path / 'eval'}", "--workers", "1"]) == 0
    assert {key: drop.reason for key, drop in drops(tmp_path / "train").items()} == dict.fromkeys(
        "abc", "leak:coco:caption"
    )


def annotations(tmp_path, kind: str) -> str:
    """The caption LONG of pic02.png, one of a missing picture, and in some kinds one of the training split."""
    coco = {"images": [{"id": 7, "file_name": "pic02.png"}, {"id": 8, "file_name": "gone.jpg"}]}
    texts = {7: LONG, 8: "another text that is long enough to tell"}
    coco["annotations"] = [{"image_id": number, "caption": text} for number, text in texts.items()]
    of = {"pic02.png": ("test", LONG), "pic03.jpg": ("train", "b c d e f g h")}
    karpathy = [{"filename": name, "split": split, "sentences": [{"raw": text}]} for name, (split, text) in of.items()]
    files = {
        "coco.json": json.dumps(coco),
        "karpathy.json": json.dumps({"images": karpathy}),
        "results.csv": f"image_name| comment_number| comment\npic02.png| 0| {LONG} .\ngone.jpg|0|b c d e f g h\n",
        "table.csv": "filename,split,raw\n"
        f'pic02.png,test,"[""{LONG}"", ""x""]"\npic03.jpg,train,"[""b c d e f g h""]"\n',
        "results.token": f"pic02.png#0\t{LONG}\npic02.png#1\tx\n",
    }
    path = tmp_path / kind
    path.write_text(files[kind])
    return str(path)


@pytest.mark.parametrize("kind", ["coco.json", "karpathy.json", "results.csv", "table.csv", "results.token"])
def test_every_format_of_captions_is_read(folder, tmp_path, kind, capsys):
    (folder / "a" / "pic01.txt").unlink()
    third = (folder / "a" / "pic03.jpg").read_bytes()
    write_shard(tmp_path / "train", 0, [("a", None, LONG), ("b", third, "b c d e f g h")])
    arguments = ["--against", f"f30k={folder}", "--captions", f"f30k={annotations(tmp_path, kind)}"]
    assert main([str(tmp_path / "train"), *arguments]) == 0
    dropped = drops(tmp_path / "train")
    assert dropped["a"].reason == "leak:f30k:caption"
    training = kind in ("karpathy.json", "table.csv")
    assert ("b" in dropped) == (not training)
    assert ("1 pictures of its training split are excluded" in capsys.readouterr().out) == training


def test_shards_can_be_the_evaluation_set(tmp_path):
    pictures = scenes(EVAL, seed=EVAL)
    held_out = [(f"k{n}", encoded(picture), f"{LONG} {n}") for n, picture in enumerate(pictures)]
    write_shard(tmp_path / "eval", 0, held_out)
    leaked = [("a", COPIES["half"](pictures[3]), None), ("b", encoded(mirrored(pictures[4])), None)]
    write_shard(tmp_path / "train", 0, [*leaked, ("c", None, f"{LONG} 5")])
    before = sorted(tmp_path.joinpath("eval").iterdir())
    assert main([str(tmp_path / "train"), "--against", f"mine={tmp_path / 'eval'}"]) == 0
    dropped = drops(tmp_path / "train")
    assert dropped["a"].detail.startswith("00000/k3 distance=") and dropped["c"].reason == "leak:mine:caption"
    assert dropped["b"].detail.startswith("00000/k4 distance=") and dropped["b"].detail.endswith("mirrored")
    assert sorted(tmp_path.joinpath("eval").iterdir()) == before


def test_of_two_sets_the_first_is_the_reason(folder, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    os.link(folder / "a" / "pic01.png", other / "x.png")
    write_shard(tmp_path / "train", 0, [("a", (other / "x.png").read_bytes(), LONG)])
    assert main([str(tmp_path / "train"), "--against", f"one={other}", "--against", f"two={folder}"]) == 0
    assert drops(tmp_path / "train")["a"].reason == "leak:one:picture"
    assert "two: 1 samples with one of its pictures" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "coco={tmp}/none"], "the directory does not exist"),
        (["--against", "coco={tmp}/empty"], "contains no .jpg, .jpeg, .png, .webp,"),
        (["--against", "coco={tmp}/bad"], "none of its 1 pictures can be decoded"),
        (["--against", "{tmp}/eval"], "is not NAME=PATH"),
        (["--against", "a={tmp}/eval", "--against", "a={tmp}/bad"], "is given twice"),
        (["--against", "a={tmp}/train"], "is given twice"),
        (["--against", "a={tmp}/eval", "--captions", "b={tmp}/x.json"], "belongs to no set"),
        (["--against", "a={tmp}/eval", "--captions", "a={tmp}/x.json"], "the file does not exist"),
        (["--against", "a={tmp}/eval", "--captions", "a={tmp}/list.json"], "cannot read --captions"),
        (["--against", "a={tmp}/eval", "--captions", "a={tmp}/columns.csv"], "its columns are foo, bar"),
        (["--against", "a={tmp}/eval", "--captions", "a={tmp}/others.csv"], "has captions of other pictures"),
        (["--against", "a={tmp}/eval", "--caption-words", "-1"], "--caption-words=-1"),
    ],
)
def test_a_users_mistake_is_one_sentence(folder, tmp_path, capsys, arguments, message):
    write_shard(tmp_path / "train", 0, [("a", None, LONG)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.jpg").write_bytes(b"")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "columns.csv").write_text("foo,bar\n1,2\n")
    (tmp_path / "others.csv").write_text("image,caption\nother.jpg,text\n")
    assert message in refused(capsys, main, tmp_path / "train", *(word.format(tmp=tmp_path) for word in arguments))
    assert not (tmp_path / "train" / "drops").exists()
