"""Two towers side by side, for pictures and for texts, whose vectors an objective such as contrastive compares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.batch import Batch, Kinds, Layout
from pretrain.contracts import Model, State
from pretrain.flops import flops_per_sequence
from pretrain.layers import PLAIN, Layers
from pretrain.models.towers.positions import cut_positions, resize_positions
from pretrain.models.towers.tower import (
    CONVOLUTIONAL,
    POSITIONS_BEFORE,
    TEXT,
    VISION,
    WITHOUT_CLASS_ROW,
    Tower,
    TowerModule,
    build_model,
    settings_of,
)


@dataclass(frozen=True)
class DualTowers(Model):
    """A vision and a text encoder of transformers, of any width each. They return one row for each picture and text, so
    that no objective can read words or patches, and they fuse no pair.

    `patch_size` of a convolutional tower is its stride (32 for the published ones). `vocab_size` counts our ids: the
    tokenizer's own, and those of BOS, PAD, EOS, UNK and <mask> that it lacks.
    """

    vision: Tower
    text: Tower
    image_size: int = 224
    patch_size: int = 16
    vocab_size: int = 64_010
    max_text_len: int = 64

    def __post_init__(self) -> None:
        for name, kinds in (("vision", VISION), ("text", TEXT)):
            tower: Any = getattr(self, name)
            if isinstance(tower, dict):  # from a config.json
                tower = Tower(**{key: _tuple(value) for key, value in tower.items() if key != "class"})
                object.__setattr__(self, name, tower)
            if tower.kind not in kinds:
                raise ValueError(f"model.{name}.kind={tower.kind!r} is no {name} tower; use {', '.join(kinds)}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size={self.image_size} is no multiple of model.patch_size={self.patch_size}; use "
                f"{self.image_size // self.patch_size * self.patch_size or self.patch_size}"
            )

    def build(
        self, experts: Sequence[str], layers: Layers = PLAIN, *, drop_path: float = 0.0, checkpointing: int = 0
    ) -> Towers:
        return Towers(self, layers, checkpointing=bool(checkpointing))

    def problems(self, stage: Any) -> list[str]:
        problems = []
        if stage.drop_path:
            problems.append(f"drop_path={stage.drop_path}: towers of transformers have none; set it to 0")
        if other := sorted(stage.mix.keys() - {"dual", "images", "texts"}):
            problems.append(f"mix.{other[0]} does not go with DualTowers, which fuse nothing; use mix.dual")
        layout = Layout(images=2, texts=2, patches=1, text_len=3, dual=2)
        for objective in stage.objectives:
            if objective.masking is not None or any(further.layout.pairs for further in objective.passes(layout)):
                problems.append(
                    f"the objective {objective.name} reads patches, words or fused pairs, and DualTowers give one row "
                    "for each picture and text; take the objective out, or use a model with fusion"
                )
        return problems

    def width(self, kind: str) -> int:
        if kind not in ("images", "texts"):
            raise ValueError(f"DualTowers have no rows of {kind}; they encode images and texts apart")
        return (self.vision if kind == "images" else self.text).width

    def flops(self, layout: Layout) -> int:
        images = layout.images * (_picture_flops(_Key(self)) if layout.images else 0)
        config = settings_of(self.text)
        sizes = {"dim": config.hidden_size, "depth": config.num_hidden_layers, "ffn_dim": config.intermediate_size}
        length = (self.max_text_len if self.text.pooling == "last" else layout.text_len) - (not self.text.bos)
        return int(images + layout.texts * (flops_per_sequence(length, **sizes) if layout.texts else 0))

    def sizes_of(self, name: str) -> dict[str, Any]:
        """The settings of transformers' configuration of the tower `name` that follow from the model's fields."""
        if name == "text":
            length = self.max_text_len + POSITIONS_BEFORE.get(self.text.kind, 0) - (not self.text.bos)
            return {"vocab_size": self.vocab_size, "max_position_embeddings": length}
        if self.vision.kind == "resnet":
            return {}
        patch = {} if self.vision.kind in CONVOLUTIONAL else {"patch_size": self.patch_size}
        return {"image_size": self.image_size} | patch

    def adapt(self, state: State, stored: Any, wanted: Mapping[str, tuple[int, ...]]) -> State:
        """Interpolates pictures' positions for another grid, and cuts texts' positions for shorter texts."""
        if not isinstance(stored, DualTowers):
            return state
        adapted = {}
        for name, value in state.items():
            if "position" in name and name.startswith("encoder.vision."):
                first = 0 if self.vision.kind in WITHOUT_CLASS_ROW else 1
                value = resize_positions(value, self.image_size // self.patch_size, first)
            elif "position" in name and name.startswith("encoder.text."):
                value = cut_positions(value, wanted[name][0])
            adapted[name] = value
        return adapted


class Towers(nn.Module):
    """See contracts.Encoder. Each kind has one row, [n, 1, width]."""

    def __init__(self, cfg: DualTowers, layers: Layers = PLAIN, *, checkpointing: bool = False):
        super().__init__()
        self.cfg = cfg
        self.vision = TowerModule(cfg.vision, cfg.sizes_of("vision"), layers, checkpointing=checkpointing)
        self.text = TowerModule(cfg.text, cfg.sizes_of("text"), layers, checkpointing=checkpointing)

    def forward(self, batch: Batch, needed: Kinds | None = None) -> Kinds:
        layout = batch.layout
        if layout.pairs:
            raise ValueError(f"{layout.pairs} pairs came to DualTowers, which fuse nothing; give them as dual")
        # Only an evaluation may lack pictures or texts; in training every micro-batch has what the mix says.
        images = self.vision.images(batch.images[: layout.images]) if layout.images else self._none("images")
        texts = self._texts(batch.text_inputs)
        return Kinds(images.unsqueeze(1), images[:0].unsqueeze(1), texts[:0].unsqueeze(1), texts.unsqueeze(1))

    def _texts(self, ids: Tensor) -> Tensor:
        """int64 [N, L] -> [N, width]"""
        if not len(ids):
            return self._none("texts")
        if ids.shape[1] > self.cfg.max_text_len:
            raise ValueError(
                f"a text of {ids.shape[1]} tokens is longer than model.max_text_len={self.cfg.max_text_len}; set it "
                f"to {ids.shape[1]} or shorten the source's text_len"
            )
        return self.text.texts(ids)

    def _none(self, kind: str) -> Tensor:
        """[0, width]: the rows of a kind without sequences."""
        return torch.zeros(0, self.cfg.width(kind), dtype=self.vision._dtype, device=self.vision.mean.device)


class _Key:
    """A model as the key of a cache: its settings are dictionaries, which have no hash."""

    def __init__(self, model: DualTowers):
        self.model = model
        self.text = f"{model.vision} {model.image_size} {model.patch_size}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@lru_cache(maxsize=64)
def _picture_flops(key: _Key) -> int:
    """FLOPs of one picture, forward and backward: three times those that torch counts in a forward pass on the meta
    device."""
    from torch.utils.flop_counter import FlopCounterMode

    model = key.model
    with torch.device("meta"):
        tower = build_model(model.vision, model.sizes_of("vision")).eval()
        pixels = torch.empty(1, 3, model.image_size, model.image_size)
    with FlopCounterMode(display=False) as counted:
        tower(pixel_values=pixels)
    return 3 * counted.get_total_flops()


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
