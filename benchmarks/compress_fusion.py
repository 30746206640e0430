"""What ONNX and int8 cost the fusion encoder: how often the quickstart's `fusion` names a hidden word of a caption that
stands beside its picture, with rows of fusion.onnx and of fusion.int8.onnx in the place of its own.

    python -m benchmarks.compress_fusion --quickstart runs/quickstart --work runs/compress \\
        --out benchmarks/results/compress_fusion.json

Pictures, captions and hidden words are those of the stage's own evaluation; the head that names words is the stage's,
in fp32. `rows_off`: the mean distance of a row from the stage's own, as a share of that one's length. The baseline
answers with the most frequent word every time. Times are measured as in benchmarks.compress.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.compress import export_once, parser_of
from benchmarks.record import machine
from pretrain.batch import PAD, Batch, Kinds
from pretrain.checkpoint.weights import WEIGHTS
from pretrain.command import about, run, write
from pretrain.evals.masked import MaskedAccuracy
from pretrain.pretrained import load
from pretrain.recipes import load_recipe
from pretrain.run.trained import trained_stage

ROUNDS = 9
Fuse = Callable[[Batch], Kinds]


def forms(weights: Path, graphs: Path) -> tuple[Any, dict[str, Fuse]]:
    """The stage's task, and how each form fuses the pairs of a batch."""
    import onnxruntime

    task = load(weights, device="cpu").task
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made: dict[str, Fuse] = {"fp32": task.encoder}
    for name, file in (("ONNX fp32", "fusion.onnx"), ("ONNX int8", "fusion.int8.onnx")):
        session = onnxruntime.InferenceSession(str(graphs / file), options, ["CPUExecutionProvider"])
        made[name] = _graph(session)
    return task, made


def _graph(session: Any) -> Fuse:
    def fuse(batch: Batch) -> Kinds:
        fed = {"pixels": batch.images.numpy(), "ids": batch.pair_inputs.numpy()}
        images, texts = map(torch.from_numpy, session.run(["image_rows", "text_rows"], fed))
        return Kinds(images[:0], images, texts, texts[:0])

    return fuse


@torch.no_grad()
def measure(task: Any, made: dict[str, Fuse], batches: list[Batch], rounds: int) -> list[dict[str, Any]]:
    """A row for each form."""
    head, seconds = task.objectives["masked"], {name: list[float]() for name in made}
    for _ in range(rounds):
        for name, fuse in made.items():
            start = time.process_time()
            fuse(batches[0])
            seconds[name].append(time.process_time() - start)
    rows, own = [], [task.encoder(batch) for batch in batches]
    for name, fuse in made.items():
        fused = [fuse(batch) for batch in batches]
        answers = [head.predict(each, batch)["pair_text"] for each, batch in zip(fused, batches, strict=True)]
        said, right = (torch.cat(parts) for parts in zip(*answers, strict=True))
        rows.append(
            {
                "form": name,
                "words_in_pairs_percent": round(_percent(said == right), 1),
                "baseline": round(100 * right.bincount().max().item() / len(right), 1),
                "words": len(right),
                "rows_off": round(_off(fused, own, batches), 5),
                "cpu_ms_per_pair": round(1000 * statistics.median(seconds[name]) / batches[0].layout.pairs, 3),
            }
        )
    return rows


def _percent(right: Tensor) -> float:
    return 100 * right.double().mean().item()


def _off(fused: list[Kinds], own: list[Kinds], batches: list[Batch]) -> float:
    """The mean relative distance of the words' rows from the stage's own, without padding."""
    seen = torch.cat([(batch.pair_tokens != PAD).flatten() for batch in batches])
    one, other = (torch.cat([each.pair_texts.flatten(0, 1) for each in some])[seen] for some in (fused, own))
    return ((one - other).norm(dim=-1) / other.norm(dim=-1)).mean().item()


def _run(args: argparse.Namespace, arguments: list[str] | None) -> None:
    weights = args.quickstart / "fusion"
    if not (weights / WEIGHTS).is_file():
        raise ValueError(f"{args.quickstart} has no finished fusion; run bash launch/quickstart.sh first")
    os.environ["DATA"] = str((args.quickstart / "corpus").resolve())
    torch.set_num_threads(1)
    graphs = export_once(weights, args.work / "onnx_fusion")
    task, made = forms(weights, graphs)
    recipe, stage = load_recipe("tiny", "fusion")
    evaluation = next(each for each in stage.evals if isinstance(each, MaskedAccuracy))
    trained = trained_stage(recipe, stage, args.quickstart, args.work, torch.nn.Module())
    mix, size = {"pairs": evaluation.mix["pairs"]}, min(evaluation.batch, evaluation.samples)
    batches = list(trained.batches(mix, size, evaluation.samples, masking=trained.masking))
    rows = measure(task, made, batches, args.rounds)
    facts = machine("torch", "onnxruntime")
    write({**about("benchmarks.compress_fusion", arguments), **facts, "rows": rows}, args.out)


def main(arguments: list[str] | None = None) -> int:
    args = parser_of("benchmarks.compress_fusion", __doc__, ROUNDS).parse_args(arguments)
    return run(lambda: _run(args, arguments), state="what was exported stays; run the same command again")


if __name__ == "__main__":
    sys.exit(main())
