"""The Multiway encoder as a recipe names it; models/multiway/sizes.py has the published ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.batch import Layout
from pretrain.contracts import Model, ModelSizes, State
from pretrain.flops import encoder_flops
from pretrain.layers import PLAIN, Layers
from pretrain.models.multiway.encoder import MultiwayEncoder
from pretrain.models.multiway.executed import executed_flops
from pretrain.models.multiway.resize import grow_vocabulary, resize_patch_positions, resize_relative_positions
from pretrain.models.multiway.shape import MultiwayShape


@dataclass(frozen=True)
class MultiwayConfig(MultiwayShape, Model):
    """A Multiway encoder: the fields of MultiwayShape, and what contracts.Model promises."""

    def build(
        self, experts: Sequence[str], layers: Layers = PLAIN, *, drop_path: float = 0.0, checkpointing: int = 0
    ) -> MultiwayEncoder:
        return MultiwayEncoder(self, experts, layers, drop_path=drop_path, checkpointing=checkpointing)

    def width(self, kind: str) -> int:
        return self.dim

    def flops(self, layout: Layout) -> int:
        sizes: Any = {"dim": self.dim, "depth": self.depth, "ffn_dim": self.ffn_dim}
        sizes |= {"patch_inputs": 3 * self.patch_size**2, "attention_dim": self.attention_dim}
        return encoder_flops(layout, **sizes)

    def executed_flops(self, layout: Layout, experts: Sequence[str], read: float, trained: frozenset[str]) -> float:
        return executed_flops(self, layout, experts, read, trained)

    @property
    def draws(self) -> int:
        return 2 * self.depth  # each block's attention and expert

    @property
    def layers(self) -> int:
        return self.depth + 1

    def layer_of(self, name: str) -> int:
        if block := re.match(r"blocks\.(\d+)\.", name):
            return int(block[1]) + 1
        return 0 if name.startswith(("vision_embed.", "text_embed.")) else self.layers

    def splits(self, experts: Sequence[str]) -> ModelSizes:
        vocabulary = self.vocab_size if "language" in experts else 0
        return ModelSizes(self.dim, self.depth, self.heads, self.ffn_dim, vocabulary)

    def adapt(self, state: State, stored: Any, wanted: Mapping[str, tuple[int, ...]]) -> State:
        """See resize.py: positions of another resolution are interpolated, a text table is cut to fewer positions, and
        a vocabulary grows at its end, in the text embedding and in every head over it."""
        if not isinstance(stored, MultiwayShape):
            return state
        adapted = {}
        for name, value in state.items():
            if name.endswith("vision_embed.positions"):
                value = resize_patch_positions(value, stored.grid, self.grid)
            elif name.endswith("relative_position.table") and stored.max_text_len == self.max_text_len:
                value = resize_relative_positions(value, stored.grid, self.grid)
            elif name.endswith("text_embed.positions"):
                value = value[: self.max_text_len]
            elif len(value) == stored.vocab_size < wanted[name][0] == self.vocab_size:
                value = grow_vocabulary(value, self.vocab_size)
            adapted[name] = value
        return adapted
