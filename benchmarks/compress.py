"""What smaller forms of the quickstart's `retrieval` cost: size, time of a picture and recall, beside the whole model.

    python -m benchmarks.compress --quickstart runs/quickstart --work runs/compress \\
        --out benchmarks/results/compress.json

Forms: ONNX in fp32 and int8, the smallest weights at 0, fewer heads (as cut, and half of them after some steps of
training), and a student with and without its teacher (recipe tiny_student), which train in WORK. Recall is that of the
stage's own evaluation, on its held-out pairs. Times are those of one thread's CPU, medians of rounds in which all forms
take turns. ONNX has a file for pictures and one for texts, and what both share stands in both. The same line goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.record import machine
from pretrain import export
from pretrain.batch import Batch
from pretrain.checkpoint.weights import WEIGHTS, read_weights
from pretrain.command import about, make_parser, run, write
from pretrain.evals.retrieval import own_captions, recall
from pretrain.json_files import read_object
from pretrain.pretrained import load
from pretrain.recipes import load_recipe
from pretrain.run.trained import trained_stage

ROOT = Path(__file__).parents[1]
ZEROS, HEADS = (0.3, 0.5, 0.7), (3, 2, 1)
TUNED_HEADS, TUNED_STEPS = 2, 200  # the pruned model that is also trained further, and for how many steps
ROUNDS, TIMED = 15, 64  # pictures of a timed batch
Embed = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Form:
    """One form of the model: how it embeds pictures (uint8 [N, 3, S, S]) and texts (ids [N, L]), and its size."""

    name: str
    images: Embed
    texts: Embed
    weights: int  # numbers that pictures and texts pass through, without zeros
    file: int  # bytes
    packed: int  # bytes of the file when it is compressed (zlib)


def forms(quickstart: Path, work: Path) -> list[Form]:
    """All rows of the table, the whole model first. What has to be trained or exported is made where it is missing."""
    whole = quickstart / "retrieval"
    made = [_ours("fp32", whole)]
    graphs = export_once(whole, work / "onnx")
    made += [_onnx(f"ONNX {kind}", graphs, end, made[0].weights) for kind, end in (("fp32", ""), ("int8", ".int8"))]
    for share in ZEROS:
        made.append(_ours(f"smallest {100 * share:g} % at 0", _pruned(whole, work, "zeros", share)))
    for heads in HEADS:
        cut = _pruned(whole, work, "heads", heads)
        made.append(_ours(f"{heads} of 4 heads", cut))
        if heads != TUNED_HEADS:
            continue
        settings = [f"init_from={cut}", f"model.heads={heads}", "model.head_dim=32", f"steps={TUNED_STEPS}"]
        tuned = train(quickstart, work / f"heads{heads}", "tiny", "retrieval", *settings)
        made.append(_ours(f"{heads} of 4 heads, {TUNED_STEPS} steps later", tuned))
    teacher = f"objectives.1.teacher={whole.resolve()}"
    made.append(_ours("student", train(quickstart, work / "students", "tiny_student", "student", teacher)))
    made.append(
        _ours("student without a teacher", train(quickstart, work / "students", "tiny_student", "student_alone"))
    )
    return made


def export_once(whole: Path, graphs: Path) -> Path:
    """The ONNX graphs of a stage, in fp32 and int8, made where they are missing."""
    if not (graphs / "model.json").exists():
        _export("to-onnx", whole, graphs, "--int8")
    return graphs


def _export(*line: object) -> None:
    if code := export.main([str(word) for word in line]):
        raise ValueError(f"pretrain.export {' '.join(map(str, line))} ended with {code}; see above")


def _pruned(whole: Path, work: Path, how: str, number: float) -> Path:
    place = work / f"{how}_{number:g}"
    if not (place / WEIGHTS).exists():
        _export("prune", whole, place, f"--{how}", f"{number:g}")
    return place.resolve()


def train(quickstart: Path, place: Path, recipe: str, stage: str, *settings: str) -> Path:
    """Trains the stage, unless it is finished -> its directory."""
    env = os.environ | {"DATA": str((quickstart / "corpus").resolve()), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "pretrain.train", "--recipe", recipe, "--stage", stage, "--run-dir", str(place)]
    line += ["--ds", str(ROOT / "ds_configs/zero0.json"), *(word for each in settings for word in ("--set", each))]
    if not (place / stage / WEIGHTS).exists():
        subprocess.run(line, env=env, check=True)
    return place / stage


def _ours(name: str, directory: Path) -> Form:
    model = load(directory, device="cpu")
    encoder = [value for key, value in read_weights(directory)[0].items() if _used(key)]
    data = b"".join(value.contiguous().numpy().tobytes() for value in encoder)
    count = sum(int((value != 0).sum()) for value in encoder)
    return Form(name, model.embed_looks, model.embed_tokens, count, len(data), len(zlib.compress(data)))


def _used(key: str) -> bool:
    """Whether a picture or a text by itself passes through this weight; the file also has what other stages trained."""
    return key.startswith(("encoder.", "objectives.contrastive.")) and "fusion" not in key and "mask_token" not in key


def _onnx(name: str, directory: Path, end: str, weights: int) -> Form:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    paths = [directory / f"{route}{end}.onnx" for route in ("vision", "text")]
    vision, text = (onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"]) for path in paths)
    data = b"".join(path.read_bytes() for path in paths)

    def images(pixels: Tensor) -> Tensor:
        return torch.from_numpy(vision.run(["vector"], {"pixels": pixels.numpy()})[0])

    def texts(ids: Tensor) -> Tensor:
        return torch.from_numpy(text.run(["vector"], {"ids": ids.numpy()})[0])

    return Form(name, images, texts, weights, len(data), len(zlib.compress(data)))


def recalls(form: Form, batches: list[Batch], samples: int) -> dict[str, float]:
    """R@1 both ways, in percent, counted as evals/retrieval.py does."""
    images = torch.cat([form.images(batch.images) for batch in batches])[:samples]
    texts = torch.cat([form.texts(batch.text_tokens) for batch in batches])[:samples]
    tokens = torch.cat([batch.text_tokens for batch in batches])[:samples]
    _, caption = tokens.unique(dim=0, return_inverse=True)
    right = own_captions(torch.arange(samples), samples) | (caption[:, None] == caption[None, :])
    scores = images @ texts.T
    both = {"image_to_text": recall(scores, right), "text_to_image": recall(scores.T, right.T)}
    return {f"{way} R@1": round(values["R@1"], 1) for way, values in both.items()}


def times(made: list[Form], pixels: Tensor, rounds: int) -> list[float]:
    """CPU milliseconds a picture of each form: the median of `rounds` in which they take turns. A clock would measure
    what else keeps the machine busy."""
    took: list[list[float]] = [[] for _ in made]
    for turn in range(rounds + 1):
        for own, form in zip(took, made, strict=True):
            start = time.process_time()
            form.images(pixels)
            if turn:  # the first warms up
                own.append(1000 * (time.process_time() - start) / len(pixels))
    return [statistics.median(own) for own in took]


def held_out(quickstart: Path, work: Path) -> tuple[list[Batch], int]:
    """The batches of the stage's own evaluation."""
    recipe, stage = load_recipe("tiny", "retrieval")
    evaluation: Any = stage.evals[0]
    trained = trained_stage(recipe, stage, quickstart, work, torch.nn.Module())
    return list(trained.batches({"dual": evaluation.pairs}, evaluation.batch, evaluation.samples)), evaluation.samples


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    if not (args.quickstart / "retrieval" / WEIGHTS).is_file():
        raise ValueError(f"{args.quickstart} has no finished retrieval; run bash launch/quickstart.sh first")
    os.environ["DATA"] = str((args.quickstart / "corpus").resolve())
    torch.set_num_threads(1)
    made = forms(args.quickstart, args.work)
    batches, samples = held_out(args.quickstart, args.work)
    took = times(made, batches[0].images[:TIMED], args.rounds)
    rows = []
    for form, each in zip(made, took, strict=True):
        sizes = {"weights_not_0": form.weights, "mib": _mebibytes(form.file), "mib_compressed": _mebibytes(form.packed)}
        speed = {"cpu_ms_per_picture": round(each, 3), "times_as_fast": round(took[0] / each, 2)}
        rows.append({"form": form.name, **sizes, **speed, **recalls(form, batches, samples)})
    noted = read_object(args.quickstart / "retrieval" / "eval.json")
    own = {key: value for key, value in noted.items() if key.endswith("R@1")}
    facts = machine("torch", "onnxruntime")
    write({**about("benchmarks.compress", arguments), **facts, "quickstart": own, "rows": rows}, args.out)


def _mebibytes(count: int) -> float:
    return round(count / 2**20, 2)


def parser_of(name: str, description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The arguments of a benchmark that makes forms of the quickstart's models and times them in `rounds` turns."""
    parser = make_parser(name, description, "--quickstart runs/quickstart --work runs/compress")
    parser.add_argument("--quickstart", required=True, type=Path, help="where launch/quickstart.sh wrote its stages")
    parser.add_argument("--work", required=True, type=Path, help="a directory for what is made here")
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each form is timed (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON, too")
    return parser


def main(arguments: list[str] | None = None) -> int:
    args = parser_of("benchmarks.compress", __doc__, ROUNDS).parse_args(arguments)
    return run(lambda: _run(args, arguments), state="finished forms stay; run the same command to continue")


if __name__ == "__main__":
    sys.exit(main())
