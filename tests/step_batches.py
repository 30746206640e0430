"""What tests of parallel training share: a toy model, random global batches for it, cut into any number of equal parts,
and some steps of training, in one plain process or on ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pretrain.batch import DROP_PATH, PAD, Batch, Layout, make_batch
from pretrain.models.multiway.config import MultiwayConfig
from pretrain.objectives.masked import MaskedData
from pretrain.optim import Optim, build_optimizer, learning_rate

CONFIGS = Path(__file__).parents[1] / "ds_configs"
EXPERTS = ("vision", "language", "fusion")
PAPER = MultiwayConfig(
    dim=32,
    depth=3,
    heads=2,
    ffn_dim=64,
    image_size=16,
    patch_size=4,
    vocab_size=32,  # losses stay below 4, where fp32 has steps of 2.4e-7
    max_text_len=10,
    fusion_layers=1,
    init_std=0.1,
)
MODELS = {
    "paper": PAPER,
    "released": replace(PAPER, attention="per_modality", fusion_layers=0, sub_norm=True, init="sub_norm"),
    "vlmo": replace(PAPER, fusion_layers=2, layer_scale=0.1, relative_position=True, text_norm=True, key_bias=False),
}
DROP = 0.3  # drop path's rate
FIRST_WORD, CODES = 4, 20  # ids below are special; codes of pictures
MASKED, TIED = MaskedData(image_codes=24), MaskedData(image_codes=24, tied_text_head=True)

NONE: Mapping[str, int] = {}
Mix = tuple[int, int, int]  # images, pairs and texts of a global batch


def step_layout(mix: Mix, parts: int) -> Layout:
    images, pairs, texts = (count // parts for count in mix)
    return Layout(images, pairs, texts, patches=16, pair_len=8, text_len=10)


def step_batch(
    mix: Mix, step: int, part: int, parts: int, *, depth: int = PAPER.depth, draws: Mapping[str, int] = NONE
) -> Batch:
    """Part `part` of `parts` equal ones of the step's global batch, with random numbers for drop path in `depth` blocks
    and `draws` of each sequence for objectives. In place of a hidden word stands the last id or another word."""
    generator = torch.Generator().manual_seed(step)
    (images, pairs, texts), vocab = mix, PAPER.vocab_size

    def text(count: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        ids = torch.randint(FIRST_WORD, vocab, (count, length), generator=generator)
        masked = torch.rand(count, length, generator=generator) < 0.4
        for row in range(count):  # padding of different lengths
            ids[row, length - row % 3 :] = PAD
            masked[row, length - row % 3 :] = False
        others = torch.randint(FIRST_WORD, vocab, (count, length), generator=generator)
        others[torch.rand(count, length, generator=generator) < 0.5] = vocab - 1
        return ids, torch.where(masked, others, ids), masked

    def share(whole: Tensor, *counts: int) -> Tensor:
        return torch.cat([kind.chunk(parts)[part] if len(kind) else kind for kind in whole.split(list(counts))])

    count = images + pairs
    pixels = torch.randint(256, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    image_masks = torch.rand(count, 16, generator=generator) < 0.4
    codes = torch.randint(CODES, (count, 16), generator=generator)
    (pair_ids, pair_inputs, pair_masked), (text_ids, text_inputs, text_masked) = text(pairs, 8), text(texts, 10)
    wanted = {DROP_PATH: 2 * depth, **draws}
    drawn = {name: torch.rand(sum(mix), each, generator=generator) for name, each in wanted.items()}
    return make_batch(
        step_layout(mix, parts),
        images=share(pixels, images, pairs),
        image_masks=share(image_masks, images, pairs),
        image_codes=share(codes, images, pairs),
        pair_tokens=share(pair_ids, pairs),
        pair_inputs=share(pair_inputs, pairs),
        pair_masked=share(pair_masked, pairs),
        text_tokens=share(text_ids, texts),
        text_inputs=share(text_inputs, texts),
        text_masked=share(text_masked, texts),
        draws={name: share(numbers, *mix) for name, numbers in drawn.items()},
    )


DUAL = 8  # dual pairs of `dual_batch`


def dual_batch(step: int, part: int = 0, parts: int = 1) -> Batch:
    """Part `part` of eight dual pairs, one picture and one text alone beside each."""
    made = step_batch((2 * DUAL, 0, 2 * DUAL), step, 0, 1, draws={"matching": 1})
    size = DUAL // parts
    mine = torch.arange(part * size, part * size + size)
    both = torch.cat([mine, DUAL + mine])
    return make_batch(
        Layout(images=2 * size, texts=2 * size, patches=16, text_len=10, dual=size),
        images=made.images[both],
        text_tokens=made.text_tokens[both],
        draws={name: torch.cat([own[both], own[2 * DUAL + both]]) for name, own in made.draws.items()},
    )


class Trained(NamedTuple):
    """What a run gives: of each step the report and the gradient norm before clipping, and the weights at the end."""

    reports: list[dict[str, float]]
    norms: list[float]
    weights: dict[str, Tensor]


def freeze(task: nn.Module, trainable: Sequence[str]) -> None:
    for name, value in task.named_parameters():
        value.requires_grad_(any(fnmatch(name, pattern) for pattern in trainable))


def train_alone(
    task: nn.Module,
    optim: Optim,
    batches: Iterable[Batch],
    precision: str = "fp32",
    of: int | None = None,
    first_steps: Mapping[str, int] = NONE,
) -> Trained:
    """A step for each batch in one process without DeepSpeed. `of`: the steps of the learning rate's schedule, as many
    as there are batches by default. With `precision` bf16 weights and activations are in bf16, and AdamW has fp32
    masters. `first_steps`: {parameter: the step in which AdamW meets it}, where that is not the first one."""
    rounded: Any = task if precision == "fp32" else copy.deepcopy(task).bfloat16()
    optimizer, batches = build_optimizer(task, optim), list(batches)
    reports, norms = [], []
    for step, batch in enumerate(batches, 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(optim, step, of or len(batches))
        rounded.load_state_dict(task.state_dict())
        rounded.zero_grad()
        report = rounded(batch)
        report["loss"].backward()
        for (name, value), own in zip(task.named_parameters(), rounded.parameters(), strict=True):
            waits = own.grad is None or step < first_steps.get(name, 1)
            value.grad = None if waits else own.grad.float()
        # By norm + 1e-6, as DeepSpeed clips.
        norms.append(nn.utils.clip_grad_norm_(task.parameters(), optim.clip).item())
        optimizer.step()
        if rounded is task and hasattr(task, "after_step"):
            task.after_step()
        reports.append({name: value.item() for name, value in report.items()})
    return Trained(reports, norms, task.state_dict())


def train_on_ranks(engine: Any, mesh: Any, micro_batches: Callable[[int, int, int], Batch], steps: int) -> Trained:
    """Trains on `micro_batches(step, part, parts)` of the steps 1 .. `steps`, by the calls of pretrain/run -> this
    rank's own reports and norms, and on rank 0 the whole weights."""
    from pretrain.parallel.pipeline import pipeline_step
    from pretrain.parallel.skipping import gradient_norm
    from pretrain.parallel.state import full_state
    from pretrain.run.step import train_step

    accumulation, last = engine.gradient_accumulation_steps(), mesh.pipe.size - 1
    first, parts = mesh.data.rank * accumulation, mesh.data.size * accumulation
    reports, norms = [], []
    for step in range(1, steps + 1):
        batches = [micro_batches(step, first + i, parts) for i in range(accumulation)]
        if last:
            report = pipeline_step(engine, batches if mesh.pipe.rank in (0, last) else [])
        else:
            report = train_step(engine, batches, lambda batch: batch, first=step == 1)
        reports.append({name: value.item() for name, value in report.items()})
        norms.append(float(gradient_norm(engine)))
    return Trained(reports, norms, full_state(engine, mesh))


def mean_reports(ranks: list[Trained]) -> list[dict[str, float]]:
    """The mean over ranks of each step's reports."""
    steps = zip(*(run.reports for run in ranks), strict=True)
    return [{name: sum(one[name] for one in step) / len(ranks) for name in step[0]} for step in steps]
