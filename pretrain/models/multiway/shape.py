"""The shape of a Multiway encoder, and the checks of what a user can get wrong about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.batch import Layout

EXPERTS = ("vision", "language", "fusion")


@dataclass(frozen=True)
class MultiwayShape:
    """The fields of MultiwayConfig, for the modules that are built by them."""

    dim: int
    depth: int
    heads: int
    ffn_dim: int
    image_size: int
    patch_size: int
    vocab_size: int
    max_text_len: int = 196
    # shared: one attention and one attention norm for all rows, experts own their norm (the paper, VLMo).
    # per_modality: vision and language rows have projections and norms of their own (the released BEiT-3).
    attention: Literal["shared", "per_modality"] = "shared"
    fusion_layers: int = 0  # the top blocks in which pairs have an expert of their own
    sub_norm: bool = False  # a second norm before the output projections (Magneto, arXiv 2210.06423)
    layer_scale: float | None = None  # initial value of a learned factor on each branch's outputs
    relative_position: bool = False  # VLMo's bias on the attention scores, instead of learned positions
    text_norm: bool = False  # a norm behind the text embedding (BERT, VLMo)
    key_bias: bool = True
    norm_eps: float = 1e-5
    final_norm: bool = True  # a norm behind the last block; the released classification and VQA models have none
    # scaled: a normal distribution of init_std that is cut at init_std, layer l's output matrices / sqrt(2 l) (BEiT-3,
    # footnote 4: "within a small range"; BEiT's code). sub_norm: Magneto's for the blocks' matrices, Xavier normal
    # without a cut.
    init: Literal["scaled", "sub_norm"] = "scaled"
    init_std: float = 0.02
    # per_modality: a feed-forward expert for each kind of rows. shared: one for all rows, as in ViLT.
    ffn: Literal["per_modality", "shared"] = "per_modality"
    head_dim: int | None = None  # width of a head; None: dim / heads. Pruned models have fewer heads than fill dim

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "depth",
            "heads",
            "ffn_dim",
            "image_size",
            "patch_size",
            "vocab_size",
            "max_text_len",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} is wrong because it must be at least 1")
        if self.head_dim is not None and self.head_dim < 1:
            raise ValueError(f"model.head_dim={self.head_dim} is below 1; leave it out, and it is dim / heads")
        if self.head_dim is None and self.dim % self.heads:
            above = (self.dim // self.heads + 1) * self.heads
            raise ValueError(f"model.dim={self.dim} is not a multiple of model.heads={self.heads}; use {above}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}; "
                f"use {max(self.image_size // self.patch_size, 1) * self.patch_size}"
            )
        if not 0 <= self.fusion_layers <= self.depth:
            raise ValueError(
                f"model.fusion_layers={self.fusion_layers} is wrong because the model has {self.depth} blocks; "
                f"use 0 to {self.depth}"
            )
        if not self.init_std > 0:
            raise ValueError(f"model.init_std={self.init_std} must be above 0; the papers use 0.02")
        if self.ffn == "shared" and self.fusion_layers:
            raise ValueError(
                f"model.fusion_layers={self.fusion_layers} does not go with model.ffn='shared', where pairs have no "
                "expert of their own; use 0"
            )
        kinds = ("shared", "per_modality")
        for name, choices in (("attention", kinds), ("ffn", kinds), ("init", ("scaled", "sub_norm"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"model.{name}={getattr(self, name)!r} is unknown; use {' or '.join(choices)}")

    @property
    def head_width(self) -> int:
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def attention_dim(self) -> int:
        """Width of all heads together."""
        return self.heads * self.head_width

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """The rows of one image without its class row."""
        return self.grid**2


def check_experts(experts: Sequence[str]) -> None:
    """ValueError for experts that no Multiway encoder has, or not in this combination."""
    if unknown := [name for name in experts if name not in EXPERTS]:
        raise ValueError(f"experts={tuple(experts)} holds {unknown[0]!r}, which is unknown; use {', '.join(EXPERTS)}")
    if not {"vision", "language"} & set(experts):
        raise ValueError(f"experts={tuple(experts)} is wrong because it needs vision, language or both")
    if "fusion" in experts and not {"vision", "language"} <= set(experts):
        raise ValueError(f"experts={tuple(experts)} is wrong because fusion stands on vision and language; add both")


def check_layout(layout: Layout, cfg: MultiwayShape, experts: Sequence[str]) -> None:
    """ValueError for a micro-batch that an encoder of shape `cfg` with these experts cannot read."""
    if layout.rows == 0:
        raise ValueError("the batch is empty: its layout has no rows; give it images, pairs or texts")
    for name, rows in (("vision", layout.vision_rows), ("language", layout.language_rows)):
        if rows and name not in experts:
            raise ValueError(
                f"the batch has {rows} {name} rows but this stage's experts={tuple(experts)} hold no {name}; "
                f"add {name!r} to them or take the source out of the mix"
            )
    if layout.images + layout.pairs and layout.patches != cfg.patches:
        raise ValueError(
            f"layout.patches={layout.patches} does not fit the model's {cfg.patches} patches per image; "
            f"use images of {cfg.image_size} pixels and patches of {cfg.patch_size}"
        )
