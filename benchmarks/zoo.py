"""The neighbours side by side: each architecture and objective on one corpus, from scratch, for the same samples.

    python -m benchmarks.zoo --samples 19200 --run-dir runs/zoo --out benchmarks/results/zoo.json

Each member is a stage of a tiny recipe at its own rates, trained by pretrain.train and evaluated by pretrain.evaluate
on the quickstart's corpus. Each objective sees 64 pairs a step, as the published ones all see the whole batch: contrast
and matching 64 dual pairs, and masked words 64 others, so that neither takes pairs from the other. A stage that is
finished is not trained again: after a kill the same line goes on. Beside the JSON lies a picture, quality over compute.
Speeds depend on what else the machine did; quality and FLOPs do not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.record import machine
from benchmarks.zoo_picture import Mark, picture
from data_tools.sample_corpus import main as draw_corpus
from data_tools.train_text_tokenizer import train as train_tokenizer
from pretrain import command
from pretrain.config import Recipe, Stage
from pretrain.data.mixture import micro_layout
from pretrain.files import write_file
from pretrain.json_files import read_object
from pretrain.layers import PLAIN
from pretrain.metrics import read_metrics
from pretrain.recipes import load_recipe

ROOT = Path(__file__).parents[1]
STEP = 64  # pairs that each objective sees
FIRST = 3  # lines of metrics.jsonl that are left out of the speed: caches, the first batches
SCORES = {
    "R@1_image_to_text": "retrieval/image_to_text/R@1",
    "R@1_text_to_image": "retrieval/text_to_image/R@1",
    "matching": "matching/accuracy",
    "matching_baseline": "matching/baseline",
    "matching_choice": "matching/choice",
    "masked_words": "masked/pair_text/accuracy",
    "masked_words_baseline": "masked/pair_text/baseline",
    "CIDEr": "captions/CIDEr",
}


@dataclass(frozen=True)
class Member:
    """A stage of a recipe, and what of it is set for the comparison."""

    recipe: str
    stage: str
    settings: tuple[str, ...] = ()

    def all_settings(self, samples: int) -> list[str]:
        return [f"steps={samples // STEP}", "seed=0", *self.settings]

    def load(self, samples: int) -> tuple[Recipe, Stage]:
        return load_recipe(self.recipe, self.stage, self.all_settings(samples))


ALONE, BOTH = (f"batch.dual={STEP}",), (f"batch.dual={STEP}", f"batch.pairs={STEP}", "init_from=None")
# From fresh weights matching hardly begins to learn with hard negatives (benchmarks.claims). The published models that
# use them from the first step do not start from fresh weights.
EASY = ("objectives.1.random_steps=100",)
MEMBERS = {
    "CLIP": Member("tiny_towers", "clip", ALONE),
    "SigLIP": Member("tiny_towers", "siglip", ALONE),
    "VLMo": Member("tiny_vlmo", "fusion", BOTH + EASY),
    "ALBEF": Member("tiny_albef", "fusion", BOTH + EASY),
    "BLIP": Member("tiny_blip", "fusion", ALONE),
    "ViLT": Member("tiny_vilt", "fusion", BOTH),
    "ViLBERT": Member("tiny_vilbert", "fusion", BOTH),
    "UNITER": Member("tiny_uniter", "fusion", BOTH),
    "Several depths": Member("tiny_depths", "fusion", BOTH),
    "Late fusion": Member("tiny_late", "fusion", ALONE + EASY),
    "BriVL": Member("tiny_towers", "brivl", ALONE),
    "ResNet and BERT": Member("tiny_towers", "resnet_bert", ALONE),
    "ALIGN": Member("tiny_towers", "align", ALONE),
    "Multiway, contrast alone": Member("tiny", "scratch", ALONE),
}


def make_corpus(corpus: Path) -> None:
    """The corpus of launch/quickstart.sh."""
    if draw_corpus(["--out", str(corpus)]):
        raise ValueError(f"{corpus} could not be drawn; see above")
    if not (corpus / "text.model").is_file():
        shards = [str(corpus / kind / "train") for kind in ("pairs", "texts")]
        train_tokenizer(shards, corpus / "text.model", 256, model_type="bpe")


def train(member: Member, samples: int, run_dir: Path, corpus: Path) -> Path:
    """Trains and evaluates, unless that is done -> the stage's directory. ValueError where one of the two fails."""
    place = run_dir / member.recipe
    environment = os.environ | {"DATA": str(corpus), "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
    settings = [word for setting in member.all_settings(samples) for word in ("--set", setting)]
    stage = ["--run-dir", str(place), "--stage", member.stage]
    ds = ["--recipe", member.recipe, "--ds", str(ROOT / "ds_configs/zero0.json")]
    for line in (["pretrain.train", *ds, *stage, *settings], ["pretrain.evaluate", *stage, *settings]):
        code = subprocess.run([sys.executable, "-m", *line], env=environment, check=False).returncode
        if code:
            raise ValueError(f"python -m {' '.join(line)} ended with exit code {code}; see above, and start again")
    return place / member.stage


def row(name: str, member: Member, samples: int, directory: Path) -> dict[str, Any]:
    """What the table says of a member; None for what it is not trained for."""
    recipe, stage = member.load(samples)
    scores, lines = read_object(directory / "eval.json"), read_metrics(directory / "metrics.jsonl")
    speeds = [line["samples_per_s"] for line in lines[FIRST:] or lines if line.get("samples_per_s")]
    return {
        "name": name,
        "recipe": member.recipe,
        "stage": member.stage,
        "parameters": parameters(recipe, stage),
        "samples": stage.steps * stage.batch.total,
        "TFLOP": round(flops(recipe, stage) / 1e12, 2),
        "samples_per_s": round(statistics.median(speeds), 1) if speeds else None,
        "memory_gib": max(line["memory_gib"] for line in lines),
        **{short: scores.get(long) for short, long in SCORES.items()},
    }


def parameters(recipe: Recipe, stage: Stage) -> int:
    """How many the encoder and the heads have; a momentum teacher, with as many again, does not count."""
    with torch.device("meta"):
        task = stage.task.build(recipe.model_of(stage), stage, PLAIN, None)
    return sum(value.numel() for value in task.parameters())


def flops(recipe: Recipe, stage: Stage) -> float:
    """FLOPs of all steps of the stage, forward and backward, padding included."""
    model = recipe.model_of(stage)
    patches = (model.image_size // model.patch_size) ** 2
    layout = micro_layout(stage.mix, stage.batch.counts(), patches, 1)
    return stage.steps * stage.task.flops(model, stage, layout)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    head = ("", "parameters", "samples/s", "GiB", "TFLOP", "R@1 i→t / t→i", "matching (of 50)", "choice (of 50)",
            "masked words (of {})", "CIDEr")  # fmt: skip
    baseline = next((each["masked_words_baseline"] for each in rows if each["masked_words_baseline"]), None)
    words = head[-2].format("-" if baseline is None else f"{baseline:.1f}")
    lines = [(*head[:-2], words, head[-1]), ("---",) * len(head)]
    for each in rows:
        both = [_number(each[f"R@1_{way}"]) for way in ("image_to_text", "text_to_image")]
        lines.append((
            each["name"], f"{each['parameters'] / 1e6:.2f} M", _number(each["samples_per_s"], 0),
            _number(each["memory_gib"], 2), _number(each["TFLOP"]), " / ".join(both), _number(each["matching"]),
            _number(each["matching_choice"]), _number(each["masked_words"]), _number(each["CIDEr"]),
        ))  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def marks(rows: list[dict[str, Any]]) -> list[Mark]:
    """Mean R@1 of those that retrieve, over their compute."""
    ways = ("R@1_image_to_text", "R@1_text_to_image")
    return [
        Mark(each["name"], each["TFLOP"], statistics.mean(each[way] for way in ways))
        for each in rows
        if each[ways[0]] is not None
    ]


def measure(args: argparse.Namespace, arguments: list[str] | None) -> None:
    if args.samples < STEP * 10:
        raise ValueError(f"--samples {args.samples} are less than ten steps of {STEP}; use {STEP * 10} or more")
    if unknown := [name for name in args.members if name not in MEMBERS]:
        raise ValueError(f"--members {unknown[0]!r} is not known; use some of {', '.join(MEMBERS)}")
    run_dir = args.run_dir.absolute()
    make_corpus(run_dir / "corpus")
    os.environ["DATA"] = str(run_dir / "corpus")
    facts = command.about("benchmarks.zoo", arguments) | machine("torch", "transformers")
    rows: list[dict[str, Any]] = []
    for name in args.members:
        directory = train(MEMBERS[name], args.samples, run_dir, run_dir / "corpus")
        rows.append(row(name, MEMBERS[name], args.samples, directory))
        results = {"rows": rows, "chance_R@1": round(100 / 256, 2), **facts}
        command.write(results, args.out, show=False)
        if args.out is not None and len(marks(rows)) > 1:
            write_file(args.out.with_suffix(".svg"), picture(marks(rows)).encode())
    print(table(rows))


def main(arguments: list[str] | None = None) -> int:
    parser = command.make_parser("benchmarks.zoo", __doc__, "--samples 19200 --run-dir runs/zoo")
    parser.add_argument("--samples", type=int, default=19_200, help="that each member sees (%(default)s)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/zoo"), help="corpus and runs (%(default)s)")
    parser.add_argument("--members", nargs="+", default=list(MEMBERS), help="some of the names in the table")
    parser.add_argument("--out", type=Path, help="JSON, written after each member; the picture lies beside it")
    args = parser.parse_args(arguments)
    return command.run(lambda: measure(args, arguments), state="what was trained stays; the same line goes on")


if __name__ == "__main__":
    sys.exit(main())
