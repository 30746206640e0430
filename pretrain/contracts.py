"""What the parts of a recipe promise to the code that runs them: Model, Objective, Task, Evaluation and Source.

Each is a frozen dataclass that a recipe names; Encoder and Head are the modules that a Model and an Objective build.
Nothing in pretrain/ asks for a class or compares a name, so a new one is one new file, also outside this repository. A
class that inherits from one of these gets its defaults; a class that defines every member need not inherit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.flops import Product
from pretrain.layers import PLAIN, Layers

if TYPE_CHECKING:
    import numpy as np

State = dict[str, Tensor]


class ModelSizes(NamedTuple):
    """What tensor, sequence and pipeline ranks divide; 0 where a stage builds no such part."""

    dim: int
    depth: int
    heads: int
    ffn_dim: int
    vocab_size: int = 0


class Pass(NamedTuple):
    """A further pass through the encoder."""

    layout: Layout
    backward: bool = True  # False: without gradient, such as a teacher's
    again: int = 0  # how many of its pairs have a picture of the step's own batch; see Batch.again


class Encoder(Protocol):
    """The module that a Model builds. Every module of it runs on every call, on zero rows if need be: ZeRO reuses or
    mixes the gradients of modules that are skipped."""

    def __call__(self, batch: Batch, needed: Kinds | None = None) -> Kinds:
        """-> the rows of each kind, float [n, length, width of that kind]. Row 0 stands for its sequence; a model whose
        `problems` refuse every objective that reads other rows may return row 0 alone (length 1). `needed`: the rows
        that heads read, on the host if they are known there; all other rows, and padding, may hold anything."""

    @property
    def token_table(self) -> nn.Parameter | None:
        """The text embedding's table, for objectives whose head shares it."""

    def compile_blocks(self, backend: str = "inductor") -> None:
        """torch.compile what repeats, in place."""


class Model(Protocol):
    """The shape of an encoder. Weights are stored with it (config.json), and are read again by its class's name."""

    image_size: int
    patch_size: int  # pixels a side of what one image mask hides; image_size // patch_size a side is the grid
    vocab_size: int
    encodes: ClassVar[bool] = True  # it builds an Encoder; False: a module with a task of its own
    # True: a picture's rows do not depend on whether it has a text, and the encoder returns all rows of kind images.
    # It then accepts such rows as `pictures`, float [n, image_len, width], instead of the pictures of a batch's first n
    # pairs.
    shares_pictures: ClassVar[bool] = False

    def build(
        self, experts: Sequence[str], layers: Layers = PLAIN, *, drop_path: float = 0.0, checkpointing: int = 0
    ) -> nn.Module:
        """The Encoder with fresh weights. `experts`: those that the stage builds; `drop_path` and `checkpointing` as in
        config.Stage. ValueError for an option that the model lacks."""

    def problems(self, stage: Any) -> list[str]:
        """Why it cannot be trained as a config.Stage says; as Objective.problems."""
        return []

    @property
    def reserved_ids(self) -> int:
        """How many of the last ids of `vocab_size` belong to the model itself, so that no tokenizer may use them."""
        return 0

    def width(self, kind: str) -> int:
        """The width of the encoder's rows of `kind`, a field of batch.Kinds."""

    def flops(self, layout: Layout) -> int:
        """The FLOPs of one micro-batch, forward and backward, without heads; see pretrain/flops.py."""

    def executed_flops(self, layout: Layout, experts: Sequence[str], read: float, trained: frozenset[str]) -> float:
        """The part of `flops` that a step really computes, where heads read `read` rows and the encoder's parameters
        `trained` (names) are not frozen."""
        return self.flops(layout)

    @property
    def draws(self) -> int:
        """How many random numbers drop path needs for each sequence, in Batch.draws["drop_path"]."""
        return 0

    @property
    def layers(self) -> int:
        """The number of the layer behind the last block, where heads stand; for layer decay and pipelines."""
        return 1

    def layer_of(self, name: str) -> int:
        """The layer of a parameter of the encoder: 0 the embeddings, 1 .. layers - 1 the blocks."""
        return 0

    def splits(self, experts: Sequence[str]) -> ModelSizes | None:
        """The sizes that model-parallel ranks may divide; None: the model runs on data ranks only."""
        return None

    def adapt(self, state: State, stored: Any, wanted: Mapping[str, tuple[int, ...]]) -> State:
        """`state` holds tensors that the Model `stored` trained and whose shapes are not the `wanted` ones. -> the same
        names, each tensor made to fit where that makes sense (positions of another resolution), else unchanged."""
        return state


class Masking(Protocol):
    """What the loader hides of each sample; see data/masking.py."""

    @property
    def mask_eos(self) -> bool:
        """Whether the end of a text is a target too."""
        return False

    def ratios(self, kind: str) -> tuple[float, float]:
        """The shares that are hidden, (of the picture's patches, of the text's words), for one kind of a mix: images,
        pairs, texts or dual."""


class Head(Protocol):
    """What an objective adds to the model, as a module whose parameters are trained with it."""

    def needed_rows(self, batch: Batch) -> Kinds:
        """bool [n, length] per kind: the rows that `__call__` reads, none of them padding. `batch` is the copy on the
        host, without its pictures, so that nothing here waits for a device."""

    def __call__(self, encoded: Kinds, batch: Batch, encode: Encoder) -> dict[str, Tensor]:
        """-> `loss` and whatever else metrics.jsonl should hold, all scalars. `encode` is the same model, for passes
        that depend on the first one: every rank makes the same number in every step, of the layouts that
        `Objective.passes` names."""

    def after_step(self) -> None:
        """Called after each step of the optimizer; updates queues, momentum teachers, codebooks."""


class Objective(Protocol):
    """One loss of a stage. `name` is its head's name in checkpoints and metrics. `first_pass` False: its head reads
    nothing of the pass over the batch itself, which is skipped if no objective reads it. `renewed`: tensors of its head
    that begin anew where those of another stage's weights have other sizes."""

    name: ClassVar[str]
    first_pass: ClassVar[bool] = True
    renewed: ClassVar[tuple[str, ...]] = ()

    @property
    def masking(self) -> Masking | None:
        """What the loader must hide for it."""
        return None

    @property
    def reads_patches(self) -> bool:
        """Whether its own passes read a fused pair's patches, which not every model gives."""
        return False

    @property
    def draws(self) -> int:
        """How many random numbers its head reads for each sequence, in Batch.draws[name]."""
        return 0

    def build(self, model: Any, experts: Sequence[str], layers: Layers = PLAIN, tokens: Any = None) -> nn.Module:
        """Its Head with fresh weights; `tokens` is the text embedding's table, or None."""

    def join(self, head: Any, heads: Mapping[str, nn.Module]) -> None:
        """Called once all modules of the stage are built: hands its head the other heads by their names, and the
        encoder as `encoder`. The head must not register one as its submodule, whose parameters would have two names."""
        return None

    def read(self, head: Any, read: Any) -> None:
        """Gives its head the weights that it learns from, by `read(name, knob)` -> (tensors, model). ValueError for
        weights that do not fit."""
        return None

    def reads(self) -> dict[str, str]:
        """As Task.reads."""
        return {}

    def lessons(self, layout: Layout) -> dict[str, Layout]:
        """{knob of `reads`: what the model behind it encodes of a micro-batch of this layout, without gradient}, for
        the plan. Every rank holds such a model whole, in fp32."""
        return {}

    def prepare(self, head: Any, stage: Any, tokenizer: Any) -> None:
        """Called before a run's engine is built: gives its head what training needs from the stage's sources, or from
        the text tokenizer, which `tokenizer()` opens. ValueError for what cannot be read or does not fit."""
        return None

    def begin(self, head: Any) -> None:
        """Called on every rank before a run's first step, when all weights are loaded: for what begins as a copy of
        them."""
        return None

    def problems(self, stage: Any) -> list[str]:
        """Why it does not go with a config.Stage, each a sentence with the way out."""
        return []

    def passes(self, layout: Layout) -> list[Pass]:
        """The further passes through the encoder for a micro-batch of this layout; for FLOPs and the plan."""
        return []

    def products(self, layout: Layout, model: Any) -> list[Product]:
        """The matrix products of its head; for FLOPs and the plan."""
        return []

    def saves(self, layout: Layout, model: Any, width: int) -> float:
        """Bytes that its head keeps for the backward pass beside the inputs of its products, where they are many: for
        the plan. `width`: bytes of a number of the model."""
        return 0.0

    def splits(self, experts: Sequence[str]) -> dict[str, int]:
        """The sizes that tensor ranks divide, by the names of the fields that set them."""
        return {}


class Task(Protocol):
    """What a stage trains: how model and objectives become the module that DeepSpeed wraps. That module is called with
    a Batch and returns named scalars, `loss` among them. Before a run's first step its `before_training(batches)` is
    called with that step's micro-batches, and after each step of the optimizer its `after_step()`. `evaluates_loss`:
    its evaluations compute the loss, so they too need the weights that it learns from."""

    evaluates_loss: bool = False

    def problems(self, model: Any, stage: Any) -> list[str]:
        """As Objective.problems."""

    def build(self, model: Any, stage: Any, layers: Layers, read: Any) -> nn.Module:
        """The module that DeepSpeed wraps. `read(name, knob)` -> (tensors, model) opens the weights that a knob names;
        `read` is None where only names and shapes are wanted, and nothing is opened then."""

    def flops(self, model: Any, stage: Any, layout: Layout) -> float:
        """The FLOPs of one micro-batch, forward and backward."""

    def executed_flops(self, model: Any, stage: Any, layout: Layout, trained: frozenset[str]) -> float:
        """The part of `flops` that a step really computes; `trained`: names of the parameters that are not frozen."""
        return self.flops(model, stage, layout)

    def reads(self) -> dict[str, str]:
        """The other weights and files that decide its numbers: {knob: name of a stage, weights file or directory}."""


class Evaluation(Protocol):
    """One entry of Stage.evals."""

    def problems(self, stage: Any) -> list[str]:
        """As Objective.problems."""
        return []

    def run(self, trained: Any) -> tuple[dict[str, float], dict[str, list]]:
        """An evals.Trained -> numbers for eval.json, and the samples for samples.json, which the report shows. A number
        that cannot be computed here is None, and the text under NAME/missing says why."""


class Source(Protocol):
    """Where one kind of a mix comes from. `slots` are the kinds that it may fill: images, pairs, texts, dual. A source
    may have `files`, which names what it reads beside shards: a run goes on only if their content is the same."""

    slots: ClassVar[tuple[str, ...]]
    shards: str | tuple[str, ...]
    text_len: int  # rows of its text; 0 if it has none

    @property
    def wanted(self) -> tuple[str, ...]:
        """The endings of the shard members that it reads."""

    def decode(self, members: Mapping, transform: Any, tokenizer: Any, rng: np.random.Generator) -> Any:
        """A sample's members -> data.sources.Raw; BadSample for one that cannot be used, which is then replaced."""
