"""Recipes: frozen dataclasses, composed from the small configs of the rooms below. Numbers live in recipes/."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, is_dataclass
from fnmatch import fnmatch
from typing import Any

from pretrain.contracts import Evaluation, Model, Objective, Source, Task
from pretrain.data.masking import Masking, combine
from pretrain.data.mixture import KINDS, Loading, slot_problem
from pretrain.data.transforms import ImageTransform
from pretrain.models.lora import ENCODER, Lora, is_adapter
from pretrain.optim import Optim
from pretrain.parallel.average import Ema
from pretrain.parallel.sizes import Parallel
from pretrain.rollbacks import RollbackRule
from pretrain.tasks.pretrain import Pretrain

MAX_SEED = 2**48  # the loader puts the number of a sample's kind into the bits above


@dataclass(frozen=True)
class BatchSize:
    """Sequences of each kind in one optimizer step, over all ranks; `accumulation` micro-steps share them."""

    images: int = 0
    pairs: int = 0
    texts: int = 0
    dual: int = 0  # pairs seen as an image and a text apart
    accumulation: int = 1

    def __post_init__(self) -> None:
        for name, least in {**dict.fromkeys(KINDS, 0), "accumulation": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"batch.{name}={getattr(self, name)} is below {least}; use {least} or more")

    def counts(self) -> dict[str, int]:
        return {kind: count for kind in KINDS if (count := getattr(self, kind))}

    @property
    def total(self) -> int:
        return sum(self.counts().values())


@dataclass(frozen=True)
class Stage:
    """One run: its data, what it builds and trains, and where its weights come from."""

    mix: dict[str, Source]
    batch: BatchSize
    optim: Optim
    steps: int
    objectives: tuple[Objective, ...] = ()
    model: Model | None = None  # None: the recipe's
    task: Task = field(default_factory=Pretrain)
    experts: tuple[str, ...] = ("vision", "language", "fusion")
    trainable: tuple[str, ...] = ("*",)  # shell patterns over parameter names
    lora: Lora | None = None  # freezes the encoder's weights and trains adapters beside its layers
    init_from: str | None = None  # a stage of this run directory, or a weights.safetensors
    visual_tokenizer: str | None = None  # gives the image targets: a stage of this run directory, or weights
    transform: ImageTransform = field(default_factory=ImageTransform)
    # {shell pattern over trainable names: the first step that trains them}, such as {"encoder.*": 500}. All others are
    # trained from step 1. See parallel/unfreezing.py.
    unfreeze: dict[str, int] = field(default_factory=dict)
    ema: Ema | None = None  # the stage hands over this running average of its weights
    drop_path: float = 0.0  # of the last block; it rises linearly from 0
    activation_checkpointing: bool | int = 0  # n: only every n-th block's input is held for the backward pass; True: 1
    parallel: Parallel = field(default_factory=Parallel)  # ranks that share one copy of the model
    # Whether torch.compile compiles the blocks. None: yes on a GPU, unless ZeRO-3 or ranks that share the blocks split
    # them.
    compile: bool | None = None
    # If two give a figure of the same name, the second's gets a number: retrieval#2/image_to_text/R@1.
    evals: tuple[Evaluation, ...] = ()
    evals_every: int = 0  # steps between two evaluations during training; 0: only at its end
    best: str = ""  # the figure whose best checkpoint is kept; with "-" before it if low is good
    patience: int = 0  # so many evaluations without a better figure end the stage, with the best weights; 0: never

    def __post_init__(self) -> None:
        wants = {"batch": BatchSize, "optim": Optim, "transform": ImageTransform, "parallel": Parallel}
        for name, wanted in wants.items():
            if not isinstance(getattr(self, name), wanted):
                raise ValueError(f"{name}={getattr(self, name)!r} is wrong; use {wanted.__name__}(...)")
        for kind, source in self.mix.items():
            if kind not in KINDS:
                raise ValueError(f"mix.{kind} is not a kind of data; use {', '.join(KINDS)}")
            if problem := slot_problem(kind, source):
                raise ValueError(problem)
        asked, given = set(self.batch.counts()), set(self.mix)
        if asked != given:
            raise ValueError(
                f"batch asks for {sorted(asked)} but mix gives {sorted(given)}; "
                "every kind of the mix needs its batch size and the other way round"
            )
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path} is not a rate; use at least 0 and less than 1")
        if self.activation_checkpointing < 0:
            raise ValueError(
                f"activation_checkpointing={self.activation_checkpointing} is wrong; use 0 (off), 1 (every block) or a "
                "number of blocks"
            )
        objections = [problem for objective in self.objectives for problem in objective.problems(self)]
        objections += [problem for evaluation in self.evals for problem in evaluation.problems(self)]
        objections += self._problems_of_evals() + self._problems_of_lora() + self._problems_of_unfreezing()
        if objections:
            raise ValueError(objections[0])

    def _problems_of_evals(self) -> list[str]:
        numbers = {name: getattr(self, name) for name in ("evals_every", "patience")}
        problems = [f"{name}={value} is below 0; use 0 for none" for name, value in numbers.items() if value < 0]
        if self.evals_every and not self.evals:
            problems.append(f"evals_every={self.evals_every} but the stage has no evals; name some, or set it to 0")
        if self.best and not self.evals_every:
            problems.append(f"best={self.best} needs evaluations during training; set evals_every too")
        if self.patience and not self.best:
            problems.append(
                f"patience={self.patience} needs a figure; set best, such as best=retrieval/image_to_text/R@1"
            )
        return problems

    def _problems_of_lora(self) -> list[str]:
        if self.lora is None:
            return []
        problems = []
        if self.init_from is None:
            problems.append("lora leaves the encoder as it begins, and it begins at random; set init_from")
        if self.parallel.model > 1:
            problems.append(
                f"lora does not go with {self.parallel}: adapters are whole on every rank; set parallel.tensor, "
                "parallel.sequence and parallel.pipe to 1"
            )
        return problems

    def _problems_of_unfreezing(self) -> list[str]:
        problems = [
            f"unfreeze.{pattern}={first} is no later step of {self.steps}; use 2 to {self.steps}"
            for pattern, first in self.unfreeze.items()
            if not 1 < first <= self.steps
        ]
        if self.unfreeze and self.parallel.pipe > 1:
            problems.append(f"parallel.pipe={self.parallel.pipe} does not go with unfreeze; set parallel.pipe=1")
        if self.unfreeze and not self.optim.eps:
            problems.append("optim.eps=0 does not go with unfreeze: what waits would be divided by it; use 1e-8")
        return problems

    def first_step(self, name: str) -> int:
        """The first step that trains a trainable parameter of this name."""
        return next((first for pattern, first in self.unfreeze.items() if fnmatch(name, pattern)), 1)

    def trains(self, name: str) -> bool:
        """Whether the stage trains the parameter of its task that has this name."""
        if self.lora is not None and name.startswith(ENCODER) and not is_adapter(name):
            return False
        return any(fnmatch(name, pattern) for pattern in self.trainable)

    @property
    def masking(self) -> Masking | None:
        """What the loader hides, for all objectives together."""
        asked: list[Any] = [objective.masking for objective in self.objectives]
        return combine([masking for masking in asked if masking is not None])

    @property
    def reads(self) -> dict[str, str]:
        """The weights and files from which task and objectives learn: {knob: name of a stage, file or directory}."""
        parts: list[Task | Objective] = [self.task, *self.objectives]
        return {knob: name for part in parts for knob, name in part.reads().items()}

    @property
    def draws(self) -> dict[str, int]:
        """{objective: how many random numbers its head needs for each sequence}."""
        return {objective.name: objective.draws for objective in self.objectives if objective.draws}

    @property
    def head_classes(self) -> dict[str, int]:
        """{knob: the size of a head that tensor ranks divide}."""
        return {
            f"objectives.{place}.{name}": size
            for place, objective in enumerate(self.objectives)
            for name, size in objective.splits(self.experts).items()
        }


def profiled_steps(asked: str) -> tuple[int, int] | None:
    """The first and the last step that `Recipe.profile_steps` names; None for "". ValueError for any other text."""
    if not asked:
        return None
    steps = re.fullmatch(r"(\d{1,12}):(\d{1,12})", asked)
    if steps is None or not 1 <= int(steps[1]) <= int(steps[2]):
        raise ValueError(f"profile_steps={asked!r} is wrong; use the first and the last step, such as 10:15")
    return int(steps[1]), int(steps[2])


@dataclass(frozen=True)
class Recipe:
    """A model and the stages that pretrain it. The docstring of a recipe's module gives the sources of its numbers."""

    name: str
    model: Model
    stages: dict[str, Stage]
    text_tokenizer: str | None = None  # a SentencePiece model or a tokenizer.json; $VARIABLES are expanded
    seed: int = 0
    loading: Loading = field(default_factory=Loading)
    log_every: int = 10
    save_every: int = 1000
    keep: int = 2  # complete checkpoints to keep; the one before is used if the newest is damaged
    keep_every: int = 0  # checkpoints of steps that this divides are never removed; 0: none
    # Training waits only for a copy into host memory, not for the disk. That memory is taken for the whole run: 8 bytes
    # per parameter over all ranks, and 4 more on rank 0.
    save_in_background: bool = True
    # Steps between two copies of the run's state on the nodes' own disks or in their memory (IMGLISH_LOCAL), for starts
    # after a fault; each node's copy is also sent to the next node. 0: none. A copy needs no shared disk.
    copy_every: int = 0
    trace_samples: bool = False  # writes the keys that each rank consumes at each step, samples.rankNNNNN.jsonl
    # How many steps in a row may have gradients that are inf or NaN; such a step moves nothing and is counted. One more
    # ends the run, or by `rollback` sends it back to a checkpoint.
    max_skipped_steps: int = 0
    rollback: RollbackRule = field(default_factory=RollbackRule)
    profile_steps: str = ""  # FIRST:LAST, such as 10:15: rank 0 writes a trace of these steps, see run/profile.py
    # fp32 matrix products on a GPU by TF32, which uses 10 bits of each factor's mantissa (errors of 1e-3 instead of
    # 1e-7) and is up to 8 times as fast on an A100. bf16 runs have hardly any fp32 products.
    tf32: bool = False
    deterministic: bool = False  # the same bits from every start on a GPU, but slower; see run/numerics.py
    # The most seconds that a rank waits for another one, or for its data; the times of its steps set a shorter limit.
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("log_every", "save_every", "keep", "timeout_s"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)} is below 1; use 1 or more")
        if self.keep_every < 0:
            raise ValueError(f"keep_every={self.keep_every} is below 0; use 0 to keep none for good")
        if self.copy_every < 0:
            raise ValueError(f"copy_every={self.copy_every} is below 0; use 0 for no copies on the nodes")
        if self.copy_every and not self.save_in_background:
            raise ValueError(
                f"copy_every={self.copy_every} is made behind the steps; leave save_in_background=true, or use 0"
            )
        if self.max_skipped_steps < 0:
            raise ValueError(f"max_skipped_steps={self.max_skipped_steps} is below 0; use 0 to end at the first one")
        profiled_steps(self.profile_steps)
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"seed={self.seed} is wrong; use a whole number from 0 to {MAX_SEED - 1}")
        for name, stage in self.stages.items():
            for problem in stage.task.problems(self.model_of(stage), stage):
                raise ValueError(f"stage {name}: {problem}")

    def copies_at(self, step: int) -> bool:
        return self.copy_every > 0 and step % self.copy_every == 0

    def model_of(self, stage: Stage) -> Model:
        return self.model if stage.model is None else stage.model


def to_json(config: Any) -> Any:
    """A config as plain JSON values; each dataclass has its class's name under "class"."""
    if is_dataclass(config) and not isinstance(config, type):
        return {"class": type(config).__name__} | {f.name: to_json(getattr(config, f.name)) for f in fields(config)}
    if isinstance(config, dict):
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_json(value) for value in config]
    return config
