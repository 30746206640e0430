"""The cells of the parity matrix: which layouts of ranks there are, what each cell trains, and why some are illegal.

    ZeRO 0, 1, 2, 3 x TP 1, 2 x PP 1, 2 x DP 1, 2 x activation checkpointing off, on x fp32, bf16
    x images, texts, pairs, all

What else has to be seen under every topology goes round by the properties of `Cell`: the model, what is frozen, whether
the text head is tied, accumulation, and buckets. Everywhere: drop path, clipping, and every expert built, so that in
the cells of images and of texts all but one of them see no rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from pretrain.config import BatchSize, Recipe, Stage
from pretrain.data.sources import ImageShards, PairShards, TextShards
from pretrain.data.transforms import ImageTransform
from pretrain.optim import Optim
from pretrain.parallel.sizes import Parallel
from tests.step_batches import CONFIGS, DROP, MASKED, MODELS, TIED, Mix

STEPS = 5
# The first of them, by which DeepSpeed has recorded its order of work, has used it and has gone on with its moments.
FIRST = 3
# AdamW divides a gradient by its size, so where it is almost zero rounding is multiplied: a small rate keeps that below
# the tolerance. The bound on the norm is below every norm that occurs.
OPTIM = Optim(lr=2e-4, warmup_steps=2, weight_decay=0.05, clip=0.1)
TRAINABLE = {
    "nothing": ("*",),
    # As BEiT-3's second stage, beside a frozen vision expert and frozen attention.
    "experts": ("*.language.*", "encoder.text_embed.*", "objectives.*"),
    # Under a pipeline the first stage has nothing to train.
    "bottom": ("encoder.blocks.2.*", "encoder.norm.*", "objectives.*"),
}
LAYOUTS: dict[str, Mix] = {"images": (8, 0, 0), "texts": (0, 0, 8), "pairs": (0, 8, 0), "all": (8, 8, 8)}
SOURCES = {"images": ImageShards("images"), "pairs": PairShards("pairs"), "texts": TextShards("texts")}
PRECISIONS = ("fp32", "bf16")
# All of the tiny model fits into one of the shipped buckets, and below their persistence threshold.
SMALL = {"reduce_bucket_size": 4096, "allgather_bucket_size": 4096}
SMALL_3 = {"reduce_bucket_size": 4096, "stage3_prefetch_bucket_size": 4096, "stage3_param_persistence_threshold": 0}


@dataclass(frozen=True)
class Topology:
    zero: int
    tensor: int
    pipe: int
    data: int

    def __str__(self) -> str:
        return f"ZeRO-{self.zero} x TP{self.tensor} x PP{self.pipe} x DP{self.data}"

    @property
    def parallel(self) -> Parallel:
        return Parallel(tensor=self.tensor, pipe=self.pipe)

    @property
    def world(self) -> int:
        return self.tensor * self.pipe * self.data


@dataclass(frozen=True)
class Cell:
    topology: Topology
    precision: str
    checkpointing: bool
    layout: str
    seed: ClassVar[int] = 0  # of the batches
    passes: ClassVar[int] = 1

    def __str__(self) -> str:
        checkpointing = f"checkpointing {self.every}" if self.every else "no checkpointing"
        heads = "tied" if self.tied else "own"
        return (
            f"{self.topology}, {self.precision}, {checkpointing}, {self.layout}; {self.model}, frozen {self.frozen}, "
            f"{heads} text head, accumulation {self.accumulation}, {self.buckets} buckets"
        )

    @property
    def row(self) -> str:
        """Its name in the table."""
        return str(self.topology)

    @property
    def turn(self) -> int:
        """Where a topology and precision begin to go round."""
        return sum(vars(self.topology).values()) + PRECISIONS.index(self.precision)

    @property
    def mix(self) -> Mix:
        return LAYOUTS[self.layout]

    @property
    def place(self) -> int:
        return list(LAYOUTS).index(self.layout)

    @property
    def model(self) -> str:
        return list(MODELS)[(self.place + self.checkpointing + self.turn) % 3]

    @property
    def frozen(self) -> str:
        return list(TRAINABLE)[(self.place + 2 * self.checkpointing + self.turn) % 3]

    @property
    def tied(self) -> bool:
        """Never the released model's: its text head is its own."""
        return self.model != "released" and (self.place // 2 + self.turn) % 2 == 1

    @property
    def accumulation(self) -> int:
        return 4 if (self.place + self.checkpointing + self.turn) % 2 else 1

    @property
    def buckets(self) -> str:
        return "small" if (self.place + self.place // 2 + self.turn) % 2 else "shipped"

    @property
    def every(self) -> int:
        """Blocks from one saved input to the next; 0 saves everything."""
        return 1 + self.place % 2 if self.checkpointing else 0

    def recipe(self) -> tuple[Recipe, Stage]:
        images, pairs, texts = self.mix
        batch = BatchSize(images=images, pairs=pairs, texts=texts, accumulation=self.accumulation)
        stage = Stage(
            mix={kind: SOURCES[kind] for kind in batch.counts()},
            batch=batch,
            optim=OPTIM,
            steps=STEPS,
            objectives=(TIED if self.tied else MASKED,),
            trainable=TRAINABLE[self.frozen],
            transform=ImageTransform(size=16),
            drop_path=DROP,
            activation_checkpointing=self.every,
            parallel=self.topology.parallel,
        )
        return Recipe(name="parity", model=MODELS[self.model], stages={"stage": stage}), stage

    def write_json(self, folder: Path) -> Path:
        zero = self.topology.zero
        path = folder / f"zero{zero}_{self.precision}_{self.buckets}.json"
        path.write_text(json.dumps(ds_json(zero, self.precision, small=self.buckets == "small")))
        return path


def ds_json(zero: int, precision: str, *, small: bool) -> dict[str, Any]:
    """As it is shipped, or with buckets smaller than the model."""
    config = json.loads((CONFIGS / f"zero{zero}.json").read_text())
    if precision == "bf16":
        config["bf16"] = {"enabled": True}
    if small and zero:
        config["zero_optimization"] |= SMALL_3 if zero == 3 else SMALL
    return config


TOPOLOGIES = [Topology(*sizes) for sizes in product((0, 1, 2, 3), (1, 2), (1, 2), (1, 2))]


def cells_of(topology: Topology) -> list[Cell]:
    return [Cell(topology, *rest) for rest in product(PRECISIONS, (False, True), LAYOUTS)]


def why_illegal(cell: Cell) -> str | None:
    """A few words of the error; None for a legal cell."""
    zero = cell.topology.zero
    if zero == 0 and cell.precision == "bf16":
        return "stage=0 keeps no fp32 master weights"
    if cell.topology.pipe == 2 and zero == 0:
        return "parallel.pipe=2 with zero_optimization.stage=0 clips by a wrong gradient norm"
    if cell.topology.pipe == 2 and zero in (2, 3):
        return f"parallel.pipe=2 does not go with zero_optimization.stage={zero}"
    return None


def legal_cells(topology: Topology) -> list[Cell]:
    return [cell for cell in cells_of(topology) if why_illegal(cell) is None]


LEGAL = [topology for topology in TOPOLOGIES if legal_cells(topology)]
