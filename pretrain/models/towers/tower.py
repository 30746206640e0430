"""One Hugging Face encoder as a tower: its rows are pooled to one, and a projection may follow.

Only transformers' model classes are used, with a configuration that stands in the recipe: no code and no weights are
loaded from a hub. Released weights come in by `pretrain.export from-hf`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.batch import BOS, EOS, PAD
from pretrain.json_files import read_object
from pretrain.layers import PLAIN, Layers
from pretrain.models.towers.batch_norm import over_all_ranks
from pretrain.tensors import check_finite

# transformers' model_type -> its class. Its rows are patches in raster order, behind a class row or without one.
VISION = {
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "vit": "ViTModel",
    "resnet": "ResNetModel",
    "efficientnet": "EfficientNetModel",
    "align_vision_model": "AlignVisionModel",  # an EfficientNet without its last convolution
}
TEXT = {
    "clip_text_model": "CLIPTextModel",
    "siglip_text_model": "SiglipTextModel",
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "align_text_model": "AlignTextModel",
}
KINDS = VISION | TEXT
CONVOLUTIONAL = ("resnet", "efficientnet", "align_vision_model")
WITHOUT_CLASS_ROW = ("siglip_vision_model", *CONVOLUTIONAL)
# RoBERTa leaves its first positions unused, up to the id of padding.
POSITIONS_BEFORE = {"roberta": PAD + 1}
POOLINGS = ("class", "mean", "attention")
TEXT_POOLINGS = (*POOLINGS, "eos", "last")
# Settings that follow from the model's own fields.
OWNED = ("image_size", "patch_size", "vocab_size", "max_position_embeddings", "bos_token_id", "pad_token_id",
         "eos_token_id")  # fmt: skip
POOL_HEADS = 8  # of an AttentionPool behind a convolutional tower


@dataclass(frozen=True)
class Tower:
    """`kind`: transformers' model_type; `settings`: fields of its configuration, all others have transformers'
    defaults. Dropout is off: its random numbers would not come from the samples' own generators.

    `pooling`: class, the first row; mean, of the patches, or of all words but padding; eos, the row of EOS (CLIP);
    last, the last row of a text that is padded to the model's max_text_len, of a tower that reads padding like words
    (SigLIP); attention, by one learned query (SigLIP's head).
    """

    kind: str
    settings: dict[str, Any] = field(default_factory=dict)
    pooling: str = "class"
    projection: int = 0  # width of a linear layer with a bias behind the pooling; 0: none
    bos: bool = True  # False: BOS is cut off before the tower reads a text, as for SigLIP's
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # by which pictures are normalised, as in their processor's config
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"tower.kind={self.kind!r} is unknown; use {', '.join(KINDS)}")
        allowed = TEXT_POOLINGS if self.kind in TEXT else POOLINGS
        if self.pooling not in allowed:
            raise ValueError(f"tower.pooling={self.pooling!r} does not go with {self.kind}; use {', '.join(allowed)}")
        if self.pooling == "class" and self.kind in WITHOUT_CLASS_ROW:
            raise ValueError(f"tower.pooling='class': {self.kind} has no class row; use mean or attention")
        if twice := [name for name in OWNED if name in self.settings]:
            raise ValueError(
                f"tower.settings.{twice[0]} follows from the model's fields and its tokenizer; take it out"
            )
        if self.projection < 0:
            raise ValueError(f"tower.projection={self.projection} is negative; use a width, or 0 for none")
        if len(self.mean) != 3 or len(self.std) != 3 or not min(self.std) > 0:
            raise ValueError(
                f"tower.mean={self.mean}, tower.std={self.std} must be three numbers each, std's above 0; use those of "
                "the tower's preprocessor_config.json"
            )

    @property
    def rows_width(self) -> int:
        """The width of the encoder's rows."""
        config = settings_of(self)
        if self.kind == "align_vision_model":
            return _rounded(config.out_channels[-1] * config.width_coefficient, config.depth_divisor)
        sizes = getattr(config, "hidden_sizes", None)
        return int(sizes[-1] if sizes else getattr(config, "hidden_size", None) or config.hidden_dim)

    @property
    def width(self) -> int:
        """The width of the row that stands for a sequence."""
        return self.projection or self.rows_width


class TowerModule(nn.Module):
    """`own`: the settings that follow from the model's fields (see OWNED). Under ZeRO-3 the tower is built whole and
    split afterwards, because transformers draws the weights once all of them exist."""

    def __init__(self, tower: Tower, own: dict[str, Any], layers: Layers = PLAIN, *, checkpointing: bool = False):
        super().__init__()
        self.tower = tower
        if tower.kind in TEXT:
            self.longest = int(own["max_position_embeddings"]) - POSITIONS_BEFORE.get(tower.kind, 0)
        with layers.whole():
            self.model = build_model(tower, own)
            over_all_ranks(self.model, layers.gather)
            self.pool = AttentionPool(*_pool_sizes(tower)) if tower.pooling == "attention" else None
        self.project = nn.Linear(tower.rows_width, tower.projection) if tower.projection else None
        if checkpointing:
            if not self.model.supports_gradient_checkpointing:
                raise ValueError(f"activation_checkpointing: a {tower.kind} has none; set it to 0")
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if tower.kind in VISION:
            for name, value in (("mean", tower.mean), ("std", tower.std)):
                self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def images(self, pixels: Tensor) -> Tensor:
        """uint8 [N, 3, H, W], or float as `batch.Batch` has it -> [N, width]."""
        unit = pixels.float().div(255) if pixels.dtype == torch.uint8 else (pixels.float() + 1) / 2
        rows = self.model(pixel_values=((unit - self.mean) / self.std).to(self._dtype)).last_hidden_state
        if self.tower.kind in CONVOLUTIONAL:
            rows = rows.flatten(2).transpose(1, 2)
        if self.tower.kind == "clip_vision_model":
            rows = self.model.post_layernorm(rows)  # transformers gives it to the class row alone
        return self._finish(self._pool(rows))

    def texts(self, ids: Tensor) -> Tensor:
        """int64 [N, L] with our ids -> [N, width]."""
        ids = ids if self.tower.bos else ids[:, 1:]
        if self.tower.pooling == "last":
            # As SigLIP's processor: every text is as long as the model reads. Else a text's vector would depend on the
            # lengths of the others in its batch.
            ids = F.pad(ids, (0, max(self.longest - ids.shape[1], 0)), value=PAD)
        real = torch.ones_like(ids) if self.tower.pooling == "last" else (ids != PAD).long()
        rows = self.model(input_ids=ids, attention_mask=self._seen(real)).last_hidden_state
        if self.tower.pooling == "last":
            return self._finish(rows[:, -1])
        if self.tower.pooling == "eos":
            # Every text has an EOS: one that was cut still ends with it.
            places = (ids == EOS).int().argmax(-1)
            return self._finish(rows[torch.arange(ids.shape[0], device=ids.device), places])
        return self._finish(self._pool(rows, real))

    def _seen(self, real: Tensor) -> Tensor | None:
        """int64 [N, L] with 0 at padding -> the mask that transformers' layers take, [N, 1, 1, L], or None where every
        row may see all rows, or all before it. A mask of two dimensions transformers would complete, for which it asks
        whether there is any padding, and waits for the device; so it does for ALIGN without a mask."""
        # In CLIP no word sees what stands behind it, and so no padding.
        kind = self.tower.kind
        if kind == "clip_text_model" or (kind == "siglip_text_model" and self.tower.pooling == "last"):
            return None
        seen = (real != 0)[:, None, None]
        if self.model.config._attn_implementation == "sdpa":
            return seen
        # The plain attention adds the mask to the scores.
        return torch.where(seen, 0.0, torch.finfo(self._dtype).min).to(self._dtype)

    def _pool(self, rows: Tensor, real: Tensor | None = None) -> Tensor:
        """rows [N, L, width], real int64 [N, L] (0 at padding) -> [N, width]."""
        if self.pool is not None:
            return self.pool(rows, real)
        if self.tower.pooling == "class":
            return rows[:, 0]
        if real is not None:
            weights = real.unsqueeze(-1).to(rows.dtype)
            return (rows * weights).sum(1) / weights.sum(1).clamp(min=1)
        return rows[:, 0 if self.tower.kind in WITHOUT_CLASS_ROW else 1 :].mean(1)

    def _finish(self, pooled: Tensor) -> Tensor:
        return pooled if self.project is None else self.project(pooled)

    @property
    def _dtype(self) -> torch.dtype:
        # A momentum teacher's parameters are buffers.
        values = (*self.model.parameters(), *self.model.buffers())
        return next(value.dtype for value in values if value.is_floating_point())


def _rounded(channels: float, divisor: int) -> int:
    """`channels` of an EfficientNet, already times its width coefficient, rounded to a multiple of `divisor` but never
    down by more than 10 % (the code of arXiv 1905.11946, transformers' round_filters)."""
    near = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return near if near >= 0.9 * channels else near + divisor


def _pool_sizes(tower: Tower) -> tuple[int, int, int]:
    """(width, heads, feed-forward width) of its AttentionPool, those of the tower's own layers."""
    config, width = settings_of(tower), tower.rows_width
    heads = getattr(config, "num_attention_heads", POOL_HEADS)
    if width % heads:
        raise ValueError(
            f"tower.pooling='attention' has {heads} heads, which do not divide the width {width}; use mean"
        )
    return width, heads, getattr(config, "intermediate_size", 4 * width)


def build_model(tower: Tower, own: dict[str, Any]) -> Any:
    """transformers' module with fresh weights, without its own pooling layers. `own`: see TowerModule."""
    import transformers

    options = {"add_pooling_layer": False} if tower.kind in ("vit", "bert", "roberta", "align_text_model") else {}
    model = getattr(transformers, KINDS[tower.kind])(_config(tower, own), **options)
    if tower.kind == "siglip_text_model":
        model.head = nn.Identity()  # Tower.projection takes its place
    return model


def settings_of(tower: Tower) -> Any:
    """transformers' configuration of a tower, without the settings that follow from the model's fields."""
    return _cached(tower.kind, json.dumps(tower.settings, sort_keys=True))


@lru_cache(maxsize=64)
def _cached(kind: str, settings: str) -> Any:
    return _config(Tower(kind, json.loads(settings), "mean"), {})


def _config(tower: Tower, own: dict[str, Any]) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError(
            f"tower.kind={tower.kind} needs transformers ({error}); install it: pip install 'transformers>=5'"
        ) from error
    ids = {"bos_token_id": BOS, "pad_token_id": PAD, "eos_token_id": EOS} if tower.kind in TEXT else {}
    plain = AutoConfig.for_model(tower.kind, **ids)
    if unknown := [name for name in tower.settings if not hasattr(plain, name)]:
        raise ValueError(f"tower.settings.{unknown[0]} is no setting of {tower.kind}; see transformers' configuration")
    head = {"vision_use_head": False} if tower.kind == "siglip_vision_model" else {}
    try:
        config = AutoConfig.for_model(tower.kind, **tower.settings, **own, **ids, **head)
    except Exception as error:  # transformers and its checkers raise many kinds
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"tower.settings={tower.settings} are no settings of {tower.kind} ({first})") from error
    for name in ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob", "dropout_rate",
                 "drop_connect_rate"):  # fmt: skip
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return config


class AttentionPool(nn.Module):
    """One learned query attends to all rows, then a feed-forward network: SigLIP's pooling head (transformers'
    SiglipMultiheadAttentionPoolingHead). Every projection is a layer that is called, because ZeRO-3 gathers a layer's
    weights only when it is called, and not when another module reads them."""

    def __init__(self, width: int, heads: int, ffn_dim: int, eps: float = 1e-6):
        super().__init__()
        self.heads = heads
        self.probe = nn.Parameter(torch.randn(1, 1, width) * width**-0.5)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.up, self.down = nn.Linear(width, ffn_dim), nn.Linear(ffn_dim, width)

    def forward(self, rows: Tensor, real: Tensor | None = None) -> Tensor:
        """rows [N, L, width], real int64 [N, L] (0 at padding) -> [N, width]."""
        seen = None if real is None else real.bool()[:, None, None]
        asked = self.query(self.probe.to(rows.dtype)).expand(rows.shape[0], -1, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (asked, self.key(rows), self.value(rows)))
        pooled = self.out(F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))
        return (pooled + self.down(F.gelu(self.up(self.norm(pooled)), approximate="tanh")))[:, 0]


def kind_of(directory: Path) -> str:
    """The model_type of a directory of transformers. ValueError where there is none."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} holds no config.json; give a directory of transformers")
    return str(read_object(directory / "config.json").get("model_type"))


def read_directory(directory: Path, name: str | None) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a directory of transformers, by the names of its class `name` (None: the class that config.json
    says, one of KINDS), and its configuration. ValueError for a directory of another model or an incomplete one."""
    kind = kind_of(directory)
    if not any(directory.glob("*.safetensors")):
        raise ValueError(f"{directory} holds no *.safetensors (pickled weights are not read); download them there")
    if name is None and kind not in KINDS:
        raise ValueError(f"{directory} holds a {kind}; give one of {', '.join(KINDS)}")
    import transformers

    # transformers would report each weight that is not wanted here, and show a progress bar.
    loud, bar = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, name or KINDS[kind]).from_pretrained(
            directory, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    except Exception as error:  # transformers and safetensors raise a dozen kinds for a damaged directory
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{directory} cannot be read as a {name or kind} ({first}); download it again") from error
    finally:
        transformers.logging.set_verbosity(loud)
        if bar:
            transformers.logging.enable_progress_bar()
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    if missing or report["mismatched_keys"]:
        raise ValueError(
            f"{directory} is no whole {name or kind}: of its tensors {len(missing)} are missing and "
            f"{len(report['mismatched_keys'])} have another shape (first {[*missing, *report['mismatched_keys']][0]}); "
            "download it again"
        )
    state = {key: value for key, value in model.state_dict().items() if not key.startswith("pooler.")}
    for key, value in state.items():
        check_finite(directory, key, value)
    return state, model.config
