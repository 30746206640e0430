"""The cells of objectives that ask for further passes through the encoder:

    2 and 3 passes x ZeRO 0, 1, 2, 3 on 2 data ranks x fp32, bf16 x accumulation 1, 4
    x buckets as shipped, smaller than the model x overlap_comm off, on

Model and checkpointing go round.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.transforms import ImageTransform
from tests.parity.cells import OPTIM, PRECISIONS, SOURCES, STEPS, Topology, ds_json
from tests.parity.hard_pairs import HardPairs
from tests.step_batches import DROP, MODELS, Mix

# With these batches every wrong text is chosen by a larger margin than what bf16 rounds: another text would be another
# loss. {model: seed}. From one seed torch 2.13 draws other truncated normals than 2.11, so other first weights.
MARGIN = 0.03
NEWER = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 13)
SEEDS = {"paper": 6800, "released": 900, "vlmo": 3400} if NEWER else {"paper": 8, "released": 80, "vlmo": 66}


@dataclass(frozen=True)
class PassCell:
    """`Cell`, for two or three passes."""

    topology: Topology
    precision: str
    passes: int
    accumulation: int
    small: bool
    overlap: bool
    mix: Mix = (0, 32, 0)

    def __str__(self) -> str:
        return (
            f"{self.topology}, {self.precision}, {self.passes} passes, {self.model}, checkpointing {self.every}, "
            f"accumulation {self.accumulation}, {'small' if self.small else 'shipped'} buckets, "
            f"{'with' if self.overlap else 'without'} overlap"
        )

    @property
    def row(self) -> str:
        """Its name in the table."""
        return f"{self.topology}, {self.passes} passes"

    @property
    def turn(self) -> int:
        """Where a cell begins to go round."""
        return self.passes + (self.accumulation > 1) + self.small + self.overlap + self.topology.zero

    @property
    def model(self) -> str:
        return list(MODELS)[self.turn % 3]

    @property
    def seed(self) -> int:
        return SEEDS[self.model]

    @property
    def every(self) -> int:
        """Blocks from one saved input to the next; 0 saves everything."""
        return self.turn % 2

    def recipe(self) -> tuple[Recipe, Stage]:
        stage = Stage(
            mix={"pairs": SOURCES["pairs"]},
            batch=BatchSize(pairs=self.mix[1], accumulation=self.accumulation),
            optim=OPTIM,
            steps=STEPS,
            objectives=(HardPairs(teacher=self.passes == 3),),
            transform=ImageTransform(size=16),
            drop_path=DROP,
            activation_checkpointing=self.every,
        )
        return Recipe(name="parity", model=MODELS[self.model], stages={"stage": stage}), stage

    def write_json(self, folder: Path) -> Path:
        config = ds_json(self.topology.zero, self.precision, small=self.small)
        if self.topology.zero:
            config["zero_optimization"]["overlap_comm"] = self.overlap
        path = folder / f"{self}.json".replace(", ", "_").replace(" ", "_")
        path.write_text(json.dumps(config))
        return path


def pass_cells(zero: int, passes: int) -> list[PassCell]:
    """ZeRO-0 has no bf16, no buckets and no overlap."""
    precisions, switch = (PRECISIONS, (False, True)) if zero else (PRECISIONS[:1], (False,))
    topology = Topology(zero, tensor=1, pipe=1, data=2)
    return [PassCell(topology, *rest) for rest in product(precisions, (passes,), (1, 4), switch, switch)]
