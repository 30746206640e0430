"""Released weights from a directory of transformers -> our tensors, and the DualTowers that they belong to.

A directory holds config.json, *.safetensors and, for a text encoder, tokenizer.json. Pickled weights and code in the
directory are not read. A tokenizer.json does not hold what a tokenizer's Python class does to a text beforehand:
SigLIP's removes capitals and punctuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import BOS, EOS
from pretrain.contracts import State
from pretrain.models.towers.dual import DualTowers
from pretrain.models.towers.tower import (
    CONVOLUTIONAL,
    OWNED,
    POSITIONS_BEFORE,
    TEXT,
    VISION,
    Tower,
    TowerModule,
    kind_of,
    read_directory,
)

# Kind of a directory with both towers -> transformers' class, and the pooling of pictures and of texts.
WHOLE = {
    "clip": ("CLIPModel", "class", "eos"),
    "siglip": ("SiglipModel", "attention", "last"),
    "align": ("AlignModel", "mean", "class"),
}
# The mean and deviation by which each kind's own processor normalises pictures.
CLIP_LOOK: dict[str, Any] = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
IMAGENET_LOOK: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LOOKS = {"clip_vision_model": CLIP_LOOK, "resnet": IMAGENET_LOOK, "efficientnet": IMAGENET_LOOK}
STRIDE = 32  # of convolutional towers
ALIGN_SIZE = 288  # ALIGN was trained at 289 pixels, whatever its config says (arXiv 2102.05918, 5)
SIGLIP_POOL = {"attention.out_proj": "out", "layernorm": "norm", "mlp.fc1": "up", "mlp.fc2": "down"}


def read_whole(directory: Path, own_ids: Sequence[int]) -> tuple[State, DualTowers]:
    """A CLIP, SigLIP or ALIGN directory. `own_ids`: for each of our ids its row in the released embedding, -1 for a new
    id. ValueError for an incomplete directory, and for a tokenizer that does not fit."""
    kind = kind_of(directory)
    name, seen, pooling = WHOLE[kind]
    state, read = read_directory(directory, name)
    siglip = kind == "siglip"
    if siglip:  # it pads with its EOS, and reads that padding like words
        own_ids = [own_ids[BOS], own_ids[EOS], *own_ids[EOS:]]
    vision = _tower(read.vision_config, f"{kind}_vision_model", seen)
    text = _tower(read.text_config, f"{kind}_text_model", pooling, bos=not siglip)
    if siglip:
        text = Tower(text.kind, text.settings, pooling, read.text_config.projection_size, False)
    elif kind == "align":
        text = Tower(text.kind, text.settings, pooling, read.projection_dim)
    model = _model(vision, text, read.vision_config, read.text_config, len(own_ids))
    ours = _named(state, "vision_model.", "encoder.vision.model.") | _named(state, "text_model.", "encoder.text.model.")
    heads = "objectives.contrastive."
    if siglip:
        ours = _siglip(ours)
        ours |= {f"{heads}logit_bias": state["logit_bias"].reshape(1)}
    elif kind == "align":
        ours |= _named(state, "text_projection.", "encoder.text.project.")
    else:
        sides = (("vision", "visual_projection"), ("language", "text_projection"))
        ours |= {f"{heads}{name}.weight": state[f"{theirs}.weight"] for name, theirs in sides}
    scale = -state["temperature"].log() if kind == "align" else state["logit_scale"]
    ours |= {f"{heads}logit_scale": scale.reshape(1)}
    return _checked(_reordered(ours, own_ids, directory), model, directory), model


def read_pair(vision: Path, text: Path, own_ids: Sequence[int]) -> tuple[State, DualTowers]:
    """Two directories, a vision and a text encoder's, that were not trained together. `own_ids` and ValueError as in
    `read_whole`."""
    (state, seen), (words, read) = (read_directory(path, None) for path in (vision, text))
    for path, config, kinds in ((vision, seen, VISION), (text, read, TEXT)):
        if config.model_type not in kinds:
            raise ValueError(f"{path} holds a {config.model_type}; give one of {', '.join(kinds)}")
    pooling = "mean" if seen.model_type in ("resnet", "efficientnet", "siglip_vision_model") else "class"
    towers = _tower(seen, seen.model_type, pooling), _tower(read, read.model_type, "class")
    model = _model(*towers, seen, read, len(own_ids))
    ours = _named(state, "", "encoder.vision.model.") | _named(words, "", "encoder.text.model.")
    return _checked(_reordered(ours, own_ids, text), model, vision), model


def _tower(config: Any, kind: str, pooling: str, *, bos: bool = True) -> Tower:
    """The Tower of a configuration; its settings are those that differ from transformers' defaults."""
    plain, own = type(config)().to_dict(), config.to_dict()
    ignored = (
        *OWNED,
        "vision_use_head",
        "model_type",
        "transformers_version",
        "dtype",
        "architectures",
        "projection_size",
    )
    settings = {
        name: value
        for name, value in own.items()
        if name in plain and name not in ignored and value != plain[name] and "drop" not in name
    }
    return Tower(kind, settings, pooling, bos=bos, **LOOKS.get(kind, {}))


def _model(vision: Tower, text: Tower, seen: Any, read: Any, vocabulary: int) -> DualTowers:
    length = read.max_position_embeddings - POSITIONS_BEFORE.get(text.kind, 0) + (not text.bos)
    size = getattr(seen, "image_size", 224)
    if vision.kind in CONVOLUTIONAL:  # it reads any multiple of its stride
        size = ALIGN_SIZE if vision.kind == "align_vision_model" else max(size // STRIDE, 1) * STRIDE
    return DualTowers(vision, text, size, getattr(seen, "patch_size", STRIDE), vocabulary, length)


def _named(state: State, theirs: str, ours: str) -> State:
    """The tensors whose names begin with `theirs`, which becomes `ours`."""
    return {ours + name.removeprefix(theirs): value for name, value in state.items() if name.startswith(theirs)}


def _siglip(state: State) -> State:
    """SigLIP's text head becomes our projection, and its pooling head our AttentionPool, with separate query, key and
    value."""
    ours: State = {}
    pool, head = "encoder.vision.model.head.", "encoder.text.model.head."
    for name, value in state.items():
        if name.startswith(head):
            ours["encoder.text.project." + name.removeprefix(head)] = value
        elif name.startswith(f"{pool}attention.in_proj_"):
            part = name.removeprefix(f"{pool}attention.in_proj_")
            for own, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                ours[f"encoder.vision.pool.{own}.{part}"] = third.clone()
        elif name.startswith(pool):
            own = name.removeprefix(pool)
            for before, now in SIGLIP_POOL.items():
                own = own.replace(f"{before}.", f"{now}.") if own.startswith(f"{before}.") else own
            ours[f"encoder.vision.pool.{own}"] = value
        else:
            ours[name] = value
    return ours


def _reordered(state: State, own_ids: Sequence[int], directory: Path) -> State:
    """The rows of the text embedding in the order of our ids; a new id's row begins as the mean of all others."""
    name = next(name for name in state if name.endswith(("token_embedding.weight", "word_embeddings.weight")))
    table, order = state[name], torch.tensor(own_ids)
    check_words(directory, table, own_ids)
    new: Tensor = table.float().mean(0, keepdim=True).to(table.dtype)
    return state | {name: torch.where(order.unsqueeze(1) < 0, new, table[order.clamp(min=0)])}


def check_words(directory: Path, table: Tensor, own_ids: Sequence[int]) -> None:
    """ValueError where a tokenizer has more ids than the embedding has rows."""
    if len(table) <= max(own_ids):
        raise ValueError(
            f"{directory}: its tokenizer.json has ids up to {max(own_ids)}, and its weights have {len(table)} words; "
            "give the tokenizer that the weights were trained with"
        )


def _checked(state: State, model: DualTowers, directory: Path) -> State:
    """The tensors of the model's towers, and of heads. ValueError if one is missing or has another shape."""
    with torch.device("meta"):
        towers = {name: TowerModule(getattr(model, name), model.sizes_of(name)) for name in ("vision", "text")}
    wanted = {f"encoder.{name}.{own}": v for name, tower in towers.items() for own, v in tower.state_dict().items()}
    for name, value in wanted.items():
        if name not in state or state[name].shape != value.shape:
            has = f"has {tuple(state[name].shape)} for" if name in state else "lacks"
            raise ValueError(f"{directory} {has} {name}, which is {tuple(value.shape)}; its weights are incomplete")
    heads = {name: value for name, value in state.items() if name.startswith("objectives.")}
    return {name: state[name].contiguous() for name in wanted} | heads
