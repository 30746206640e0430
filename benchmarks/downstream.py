"""What the quickstart's weights are worth on other tasks: chance, trained from scratch, and from its checkpoint.

    python -m benchmarks.downstream --quickstart runs/quickstart --work runs/downstream \\
        --out benchmarks/results/downstream.json

Draws scenes for each task and writes them as the public sets are laid out (a folder for each class, VQAv2's questions,
NLVR2's sentences, SNLI-VE's hypotheses), makes shards of them by data_tools.from_table, and trains and evaluates each
stage of benchmarks/downstream_recipe.py. Colour and shape of a picture's only thing (40 classes, 10 pictures each to
learn from) are also read from frozen vectors (k-NN, linear, attentive), and by their names alone. Test scenes of all
other tasks have a combination of colour and shape that no training scene has. As NLVR2 has several sentences about two
pictures, there are two here: an easy one (sentences) and a hard one (shapes). `cider` goes on from the quickstart's
captions: before and after. Run the same line again to go on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import machine
from data_tools import caption_frequencies, from_table
from data_tools.drawn.questions import hypothesis, question, sentence, side_sentence
from data_tools.drawn.scenes import TRAINING, Scene, draw_scene, encode_jpeg, random_scene
from pretrain.checkpoint.weights import read_weights, write_weights
from pretrain.command import about, make_parser, run, write
from pretrain.data.shards.reader import ShardReader, load_manifest
from pretrain.evals.attentive import Rows, attentive_answers
from pretrain.evals.captions import other_captions
from pretrain.evals.probe import linear_answers, nearest_vote
from pretrain.json_files import read_object
from pretrain.pretrained import Pretrained, load
from pretrain.stored_model import experts_in, objectives_in, read_stored
from pretrain.tasks.pretrain import PretrainTask

RECIPE = Path(__file__).with_name("downstream_recipe.py")
PER_CLASS = {"train": 10, "test": 25}
SCENES = {"train": 4000, "test": 500}  # with a question and a hypothesis each, as many pairs with two sentences
SIZE = 64
EPOCHS = 100  # of the attentive probe
METRICS = {
    "classes": ("classification/top-1", "fine-tuned, top-1 %"),
    "questions": ("answers/accuracy", "questions about a picture, VQA accuracy %"),
    "sentences": ("reasoning/accuracy", "sentences about one of two pictures, %"),
    "shapes": ("reasoning/accuracy", "sentences about the shapes of two pictures, %"),
    "hypotheses": ("entailment/accuracy", "hypotheses about a picture, %"),
    "captions": ("captions/CIDEr", "captions, CIDEr"),
    "cider": ("captions/CIDEr", "captions optimised for CIDEr"),
}
GOES_ON = {"cider": "captions"}  # stage: the quickstart's stage from which it goes on, never from scratch


def write_tasks(work: Path) -> None:
    """The sets in their public forms, and their shards in WORK/tasks."""
    raw, tasks = work / "raw", work / "tasks"
    if not (raw / "done").exists():
        for split in PER_CLASS:
            _write_classes(raw / "classes" / split, split)
            _write_scenes(raw, split)
        (raw / "done").touch()
    make_shards(raw / "classes", "--label-folders", "--out", tasks / "classes")
    for split in SCENES:
        pictures = ["--pictures", raw / f"pictures-{split}"]
        answers = ["--answers", raw / f"annotations-{split}.json", "--out", tasks / "questions" / split]
        make_shards(raw / f"questions-{split}.json", *pictures, *answers)
        for task in ("sentences", "shapes"):
            pairs = ["--pictures", raw / f"pairs-{split}", "--out", tasks / task / split]
            make_shards(raw / f"{task}-{split}.json", *pairs)
        make_shards(raw / f"snli_ve_{split}.jsonl", *pictures, "--out", tasks / "hypotheses" / split)
    notes = json.loads((raw / "annotations-train.json").read_text())["annotations"]
    counts = Counter(note["multiple_choice_answer"] for note in notes)
    (tasks / "questions" / "answers.json").write_text(json.dumps(sorted(counts, key=lambda a: (-counts[a], a))))


def make_shards(*line: object) -> None:
    """Runs data_tools.from_table. ValueError where it fails; it has said why."""
    if code := from_table.main([*map(str, line), "--workers", "1"]):
        raise ValueError(f"data_tools.from_table {' '.join(map(str, line))} ended with {code}; see above")


def _write_classes(folder: Path, split: str) -> None:
    rng, wanted = random.Random(f"classes/{split}"), dict.fromkeys(TRAINING, PER_CLASS[split])
    while any(wanted.values()):
        scene = random_scene(rng, held_out=False)
        key = (scene.things[0].colour, scene.things[0].shape)
        if len(scene.things) == 1 and wanted[key]:
            wanted[key] -= 1
            _draw(scene, rng, folder / " ".join(key) / f"{wanted[key]}.jpg")


def _write_scenes(raw: Path, split: str) -> None:
    rng = random.Random(f"scenes/{split}")
    questions, notes, shapes, sentences, hypotheses = [], [], [], [], []
    scenes = [random_scene(rng, held_out=split == "test") for _ in range(SCENES[split])]
    for number, scene in enumerate(scenes):
        asked, answer = question(scene, rng)
        questions.append({"question_id": number, "image_id": number, "question": asked})
        answers = [{"answer": answer, "answer_id": n} for n in range(10)]
        notes.append({"question_id": number, "multiple_choice_answer": answer, "answers": answers})
        picture = f"scene_{number:012d}"
        _draw(scene, rng, raw / f"pictures-{split}" / f"{picture}.jpg")
        other = random_scene(rng, held_out=split == "test")
        text, right = sentence((scene, other), rng)
        for side, each in enumerate((scene, other)):
            _draw(each, rng, raw / f"pairs-{split}" / f"{split}-{number}-0-img{side}.png")
        shapes.append(json.dumps({"identifier": f"{split}-{number}-0-0", "sentence": text, "label": str(right)}))
        own = random.Random(f"easier/{split}/{number}")  # so that what was drawn before stays
        text, right = side_sentence((scene, other), own)
        sentences.append(json.dumps({"identifier": f"{split}-{number}-0-1", "sentence": text, "label": str(right)}))
        text, label = hypothesis(scene, own)
        line = {"Flickr30K_ID": picture, "pairID": f"{picture}.jpg#0r1", "gold_label": label, "sentence2": text}
        hypotheses.append(json.dumps(line))
    (raw / f"questions-{split}.json").write_text(json.dumps({"questions": questions}))
    (raw / f"annotations-{split}.json").write_text(json.dumps({"annotations": notes}))
    lines = {f"sentences-{split}.json": sentences, f"shapes-{split}.json": shapes, f"snli_ve_{split}.jsonl": hypotheses}
    for name, texts in lines.items():
        (raw / name).write_text("\n".join(texts))


def _draw(scene: Scene, rng: random.Random, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_jpeg(draw_scene(scene, SIZE, rng)))


def train(quickstart: Path, work: Path, stage: str) -> float:
    """Trains and evaluates the stage, unless that is done -> its metric."""
    place = work / "run"
    env = os.environ | {"QUICKSTART": str(quickstart.resolve()), "TASKS": str((work / "tasks").resolve())}
    common = ["--recipe", str(RECIPE), "--stage", stage, "--run-dir", str(place)]
    done = place / stage / "eval.json"
    for module, more in (("train", ["--ds", str(RECIPE.parents[1] / "ds_configs/zero0.json")]), ("evaluate", [])):
        if not done.exists():
            subprocess.run([sys.executable, "-m", f"pretrain.{module}", *common, *more], env=env, check=True)
    return float(read_object(done)[METRICS[stage.removesuffix("_scratch")][0]])


def frozen(quickstart: Path, work: Path) -> Iterator[dict[str, Any]]:
    """The rows for vectors that were not fine-tuned. Of patches: the quickstart's `fusion` beside fresh weights; of the
    dual encoder: its `retrieval` beside `scratch`, which saw the same captions and had no stage before."""
    samples = {split: _labelled(work / "tasks/classes" / split) for split in PER_CLASS}
    fresh = _fresh(quickstart / "fusion", work / "fresh")
    sources = {
        "patches, frozen": (_patches, {"scratch": fresh, "pretrained": quickstart / "fusion"}),
        "dual encoder's vectors": (
            Pretrained.embed_images,
            {"scratch": quickstart / "scratch", "pretrained": quickstart / "retrieval"},
        ),
    }
    label, (data, right, names) = samples["train"][1], samples["test"]
    for source, (embed, models) in sources.items():
        scores: dict[str, dict[str, float]] = {}
        for name, weights in models.items():
            model, classes = load(weights, device="cpu"), dict[str, torch.Tensor]()
            train, test = embed(model, samples["train"][0]), embed(model, data)
            if train.ndim == 3:
                classes["attentive"] = attentive_answers(Rows(train, label), test, len(TRAINING), EPOCHS)
                train, test = train.mean(1), test.mean(1)  # of the patches
            classes["k-NN"] = nearest_vote(train, label, test, 20, len(TRAINING))
            classes["linear"] = linear_answers(train, label, test, len(TRAINING), (1e-4, 1e-3, 1e-2, 1e-1))
            for probe, answers in classes.items():
                scores.setdefault(probe, {})[name] = _percent(answers == right)
        for probe, own in scores.items():
            yield {"task": f"colour and shape, {source}, {probe}, top-1 %", "chance": 100 / len(TRAINING), **own}
    zero_shot = {
        name: _percent(load(weights, device="cpu").classify(data, names, ("a {}",)).argmax(-1) == right)
        for name, weights in models.items()
    }
    yield {"task": "colour and shape, by name alone, top-1 %", "chance": 100 / len(TRAINING), **zero_shot}


def _percent(right: torch.Tensor) -> float:
    return round(100 * right.double().mean().item(), 2)


def _patches(model: Pretrained, pictures: list[bytes]) -> torch.Tensor:
    """[N, P, D]"""
    return model.patches(pictures, batch=256)


def _labelled(shards: Path) -> tuple[list[bytes], torch.Tensor, list[str]]:
    reader = ShardReader(load_manifest(str(shards)))
    places = [(shard, n) for shard, count in enumerate(reader.manifest.counts) for n in range(count)]
    samples = [reader.read(*place) for place in places]
    facts = [json.loads(sample["json"]) for sample in samples]
    names = {fact["label"]: fact["label_name"] for fact in facts}
    label = torch.tensor([fact["label"] for fact in facts])
    return [sample["jpg"] for sample in samples], label, [names[number] for number in sorted(names)]


def _fresh(weights: Path, place: Path) -> Path:
    """The same model with fresh weights."""
    state, model, _ = read_stored(weights)
    torch.manual_seed(0)
    task = PretrainTask(model, experts_in(state), objectives_in(state, model))
    write_weights(task.state_dict(), place / "weights.safetensors", read_weights(weights)[1])
    return place


def chances(quickstart: Path, work: Path) -> dict[str, float]:
    """Of a guess: a class, the most frequent answer, a coin, another picture's caption."""
    notes = [json.loads((work / f"raw/annotations-{split}.json").read_text())["annotations"] for split in SCENES]
    guess = Counter(note["multiple_choice_answer"] for note in notes[0]).most_common(1)[0][0]
    answered = sum(note["multiple_choice_answer"] == guess for note in notes[1]) / len(notes[1])
    reader = ShardReader(load_manifest(str(quickstart / "corpus/pairs/heldout")))
    texts = [reader.read(0, number, ("txt",))["txt"].decode() for number in range(min(256, reader.manifest.counts[0]))]
    others = other_captions([[text] for text in texts])
    return {
        "classes": 100 / len(TRAINING),
        "questions": 100 * answered,
        "sentences": 50.0,
        "shapes": 50.0,
        "hypotheses": 200 / 3,  # from the sentence alone
        "captions": 100 * sum(others) / len(others),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("benchmarks.downstream", __doc__, "--quickstart runs/quickstart --work runs/downstream")
    parser.add_argument("--quickstart", type=Path, required=True, metavar="DIR", help="the quickstart's run directory")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="for the sets and the runs")
    parser.add_argument("--tasks", nargs="*", choices=METRICS, default=list(METRICS), help="to train on (all of them)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    args = parser.parse_args(arguments)
    return run(lambda: _run(args, arguments), state="finished stages stay; run the same command to continue")


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    if not (args.quickstart / "retrieval" / "weights.safetensors").is_file():
        raise ValueError(f"{args.quickstart} has no finished retrieval; run bash launch/quickstart.sh first")
    write_tasks(args.work)
    _count_grams(args.quickstart, args.work / "tasks/frequencies.json")
    rows = list(frozen(args.quickstart, args.work))
    results = {**about("benchmarks.downstream", arguments), **machine("torch"), "rows": rows}
    write(results, args.out)
    guess = chances(args.quickstart, args.work)
    for stage in args.tasks:
        task = METRICS[stage][1]
        task = f"colour and shape, {task}" if stage == "classes" else task
        if stage in GOES_ON:
            before = float(read_object(args.quickstart / GOES_ON[stage] / "eval.json")[METRICS[stage][0]])
            rows.append({"task": task, "before": before, "after": train(args.quickstart, args.work, stage)})
        else:
            scores = {"scratch": train(args.quickstart, args.work, f"{stage}_scratch")}
            scores["pretrained"] = train(args.quickstart, args.work, stage)
            rows.append({"task": task, "chance": guess[stage], **scores})
        write(results, args.out)


def _count_grams(quickstart: Path, out: Path) -> None:
    """How rare the words of the training captions are, for `cider`."""
    line = [str(quickstart / "corpus/pairs/train"), "--out", str(out)]
    if not out.exists() and caption_frequencies.main(line):
        raise ValueError(f"data_tools.caption_frequencies {' '.join(line)} failed; see above")


if __name__ == "__main__":
    sys.exit(main())
