"""The cells of published stages with more than one loss, and of what trains a part of a model:

ALBEF (momentum teacher, queue, hard partners, masked words), VLMo (contrast, hard partners, masked words), BLIP
(the same with a decoder), adapters on a frozen encoder, parts that are unfrozen later
x ZeRO 0, 1, 2, 3 on 2 data ranks, buckets smaller than the model in every second one, in fp32
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pretrain.batch import Batch, Layout, make_batch
from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import PairShards
from pretrain.data.transforms import ImageTransform
from pretrain.models.decoder.encoder_decoder import EncoderDecoder
from pretrain.models.fusion.text_queries_image import TextQueriesImage
from pretrain.models.lora import Lora
from pretrain.objectives.captioning import Captioning
from pretrain.objectives.contrastive import Contrastive
from pretrain.objectives.masked import MaskedData
from pretrain.objectives.matching import Matching
from pretrain.objectives.momentum import MomentumContrast
from pretrain.objectives.self_distillation import SelfDistillation
from pretrain.run.build import build_task
from pretrain.tasks.pretrain import Pretrain
from tests.parity.cells import OPTIM, STEPS, Topology, ds_json
from tests.step_batches import DROP, DUAL, MODELS, PAPER, Mix, Trained, step_batch, train_alone

SIZES: dict[str, Any] = {"dim": 16, "heads": 2, "ffn_dim": 32, "image_depth": 1, "text_depth": 2, "init_std": 0.1,
                         "image_size": 16, "patch_size": 4, "max_text_len": 10}  # fmt: skip
# Scales of 2 and not of 14, by which rounding would be multiplied.
MOMENTUM = MomentumContrast(8, 0.5, momentum=0.9, queue=2 * DUAL, alpha=0.4, ramp_steps=3, projection_bias=True)
CONTRAST = Contrastive(temperature=0.5)
# At DINO's temperatures fp32's rounding is multiplied by 25.
DISTILLED = SelfDistillation(
    2, momentum=0.9, prototypes=24, hidden_dim=32, bottleneck_dim=8, temperature=0.5, teacher_temperature=0.4
)
WORDS = MaskedData(image_ratio=0, pair_image_ratio=0, text_ratio=0, pair_text_ratio=0.15, dual=False, transform=True)
KINDS: dict[str, dict[str, Any]] = {
    "ALBEF": {"model": TextQueriesImage(**SIZES, fusion_depth=2, vocab_size=32), "drop_path": 0.0,
              "objectives": (MOMENTUM, Matching(), WORDS)},
    "VLMo": {"model": MODELS["vlmo"], "objectives": (CONTRAST, Matching(), WORDS),
             "task": Pretrain(weights={"masked": 0.25})},
    "BLIP": {"model": EncoderDecoder(**SIZES, vocab_size=34), "drop_path": 0.0,
             "objectives": (MOMENTUM, Matching(), Captioning(smoothing=0.1, tied_text_head=True, transform=True))},
    "self-distillation": {"objectives": (CONTRAST, DISTILLED)},
    "adapters": {"objectives": (CONTRAST, Matching()), "init_from": "x",
                 "lora": Lora(4, 8.0, ("*.attention.*", "*.experts.*"))},
    # Two losses, whose sum stays below 8: from there on fp32 has steps of 9.5e-7.
    "unfreezing": {"objectives": (CONTRAST, WORDS),
                   "unfreeze": {"encoder.blocks.0.*": 3, "encoder.text_embed.*": 4}},
}  # fmt: skip


@dataclass(frozen=True)
class PublishedCell:
    """`Cell`, for a kind of KINDS."""

    topology: Topology
    kind: str
    small: bool
    precision: ClassVar[str] = "fp32"
    accumulation: ClassVar[int] = 1  # contrast's negatives are the whole step's batch
    passes: ClassVar[int] = 1

    def __str__(self) -> str:
        return f"{self.topology}, {self.precision}, {self.kind}, {'small' if self.small else 'shipped'} buckets"

    @property
    def row(self) -> str:
        return f"{self.topology}, published"

    @property
    def mix(self) -> Mix:
        words = any(objective.masking is not None for objective in KINDS[self.kind]["objectives"])
        return DUAL, DUAL * words, DUAL

    def recipe(self) -> tuple[Recipe, Stage]:
        pairs = PairShards("pairs")
        batch = BatchSize(pairs=self.mix[1], dual=DUAL)
        common: dict[str, Any] = {"optim": OPTIM, "steps": STEPS, "transform": ImageTransform(size=16)}
        common |= {"drop_path": DROP, "model": PAPER, "batch": batch, "mix": dict.fromkeys(batch.counts(), pairs)}
        stage = Stage(**common | {"parallel": self.topology.parallel} | KINDS[self.kind])
        return Recipe(name="parity", model=PAPER, stages={"stage": stage}), stage

    def batch(self, step: int, part: int, parts: int) -> Batch:
        """Part `part` of `parts` of the step's pictures and texts, of which nothing is hidden, and of its pairs."""
        drawn = {"matching": 1, DISTILLED.name: DISTILLED.draws}
        made = step_batch(self.mix, step, part, parts, draws=drawn)
        size = DUAL // parts
        texts = {"pair_tokens": made.pair_tokens, "pair_inputs": made.pair_inputs, "pair_masked": made.pair_masked}
        layout = Layout(size, made.layout.pairs, size, patches=16, pair_len=8, text_len=10, dual=size)
        return make_batch(layout, images=made.images, **texts, text_tokens=made.text_tokens, draws=made.draws)

    def write_json(self, folder: Path) -> Path:
        path = folder / f"zero{self.topology.zero}_{self.kind}.json"
        path.write_text(json.dumps(ds_json(self.topology.zero, self.precision, small=self.small)))
        return path


def first_steps(task: Any, stage: Stage) -> dict[str, int]:
    """Of the parameters that wait, by name."""
    return {name: first for name, _ in task.named_parameters() if (first := stage.first_step(name)) > 1}


@cache
def dense_of(kind: str) -> tuple[Trained, dict[str, Any]]:
    """See runs.dense."""
    cell = PublishedCell(Topology(0, 1, 1, 1), kind, small=False)
    recipe, stage = cell.recipe()
    task: Any = build_task(recipe, stage, Path())
    task.before_training([])
    start = {name: value.clone() for name, value in task.state_dict().items()}
    batches = [cell.batch(step, 0, 1) for step in range(1, STEPS + 1)]
    return train_alone(task, OPTIM, batches, of=STEPS, first_steps=first_steps(task, stage)), start


def tensor_cells() -> list[PublishedCell]:
    return [PublishedCell(Topology(1, tensor=2, pipe=1, data=1), "VLMo", small=False)]


def published_cells(zero: int) -> list[PublishedCell]:
    topology = Topology(zero, tensor=1, pipe=1, data=2)
    return [PublishedCell(topology, kind, small=bool((place + zero) % 2)) for place, kind in enumerate(KINDS)]
