"""BLIP's released weights, a captioner's or a retriever's: from transformers' names to ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.contracts import State
from pretrain.models.decoder.encoder_decoder import EncoderDecoder
from pretrain.models.towers.released import CLIP_LOOK, check_words

# transformers' names -> ours: in a vision block, in a text block, and in the self-attention of one of the latter's
# roles, behind "own" or "causal".
VISION = {
    "layer_norm1": "norm.shared",
    "self_attn.projection": "attention.out.shared",
    "layer_norm2": "experts.vision.norm",
    "mlp.fc1": "experts.vision.up",
    "mlp.fc2": "experts.vision.down",
}
TEXT = {
    "crossattention.self.query": "cross.q",
    "crossattention.self.key": "cross.k",
    "crossattention.self.value": "cross.v",
    "crossattention.output.dense": "cross.out",
    "crossattention.output.LayerNorm": "cross_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "norm",
}
OWN = {
    "attention.self.query": ".q",
    "attention.self.key": ".k",
    "attention.self.value": ".v",
    "attention.output.dense": ".out",
    "attention.output.LayerNorm": "_norm",
}
# transformers' classes -> the prefix of the text model's tensors in each.
CLASSES = {"BlipForConditionalGeneration": "text_decoder.bert.", "BlipForImageTextRetrieval": "text_encoder."}
HEADS = {
    "vision_proj": "contrastive.vision",
    "text_proj": "contrastive.language",
    "itm_head": "matching.match",
    "text_decoder.cls.predictions.transform.dense": "captioning.transform.0",
    "text_decoder.cls.predictions.transform.LayerNorm": "captioning.transform.2",
}
TEMPERATURE = 0.07  # transformers' class stores none; BLIP's training begins with this


def blip_config(config: Any, vocabulary: int) -> EncoderDecoder:
    """The model of a transformers.BlipConfig; `vocabulary` counts our ids, without the model's own. ValueError if its
    encoders have different sizes, or another activation than gelu."""
    seen, read = config.vision_config, config.text_config
    for name in ("hidden_size", "num_attention_heads", "intermediate_size"):
        if getattr(seen, name) != getattr(read, name):
            raise ValueError(
                f"its vision encoder has {name}={getattr(seen, name)} and its text encoder {getattr(read, name)}; "
                "give a BLIP whose encoders are of one size, such as the base one"
            )
    if {seen.hidden_act, read.hidden_act} != {"gelu"}:
        raise ValueError(f"its activations are {seen.hidden_act} and {read.hidden_act}; give a BLIP with gelu in both")
    return EncoderDecoder(
        dim=read.hidden_size,
        heads=read.num_attention_heads,
        ffn_dim=read.intermediate_size,
        image_depth=seen.num_hidden_layers,
        text_depth=read.num_hidden_layers,
        image_size=seen.image_size,
        patch_size=seen.patch_size,
        vocab_size=vocabulary + 2,
        max_text_len=read.max_position_embeddings,
        image_norm_eps=seen.layer_norm_eps,
        text_norm_eps=read.layer_norm_eps,
    )


def from_blip(state: State, config: Any, own_ids: Sequence[int], directory: Any) -> State:
    """Tensors of one of CLASSES -> ours, for the model of `blip_config`. `own_ids`: for each of our ids its row in the
    released word table, -1 for a new id, which begins as the mean of all rows. The class has one self-attention; the
    other role's begins as a copy of it. KeyError where a tensor is missing."""
    prefix = next(prefix for prefix in CLASSES.values() if f"{prefix}embeddings.word_embeddings.weight" in state)
    table = state[f"{prefix}embeddings.word_embeddings.weight"]
    check_words(directory, table, own_ids)
    # [DEC] is transformers' BOS; [ENC] the last row (salesforce/BLIP, models/blip.py, init_tokenizer).
    rows = torch.tensor([*own_ids, config.text_config.bos_token_id, len(table) - 1])
    ours = {
        "text_embed.tokens.weight": _reordered(table, rows),
        "text_embed.positions": state[f"{prefix}embeddings.position_embeddings.weight"],
        **_both(state, f"{prefix}embeddings.LayerNorm", "text_embed.norm"),
        **_vision(state, config.vision_config.num_hidden_layers),
    }
    for number in range(config.text_config.num_hidden_layers):
        theirs, own = f"{prefix}encoder.layer.{number}.", f"text.{number}."
        for name, new in TEXT.items():
            ours |= _both(state, theirs + name, own + new)
        for role in ("own", "causal"):
            for name, new in OWN.items():
                ours |= {key: value.clone() for key, value in _both(state, theirs + name, own + role + new).items()}
    heads: State = {}
    for name, new in HEADS.items():
        heads |= _both(state, name, new) if f"{name}.weight" in state else {}
    if (bias := state.get("text_decoder.cls.predictions.bias")) is not None:
        heads["captioning.words.bias"] = _reordered(bias, rows)
    if "contrastive.vision.weight" in heads:
        heads["contrastive.logit_scale"] = torch.tensor([1 / TEMPERATURE]).log()
    named = {f"encoder.{name}": value for name, value in ours.items()}
    named |= {f"objectives.{name}": value for name, value in heads.items()}
    return {name: value.contiguous() for name, value in named.items()}


def _both(state: State, theirs: str, ours: str) -> State:
    return {f"{ours}.{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}


def _reordered(rows: Tensor, order: Tensor) -> Tensor:
    """[old ids, ...] -> [ids, ...]: the rows at `order` int64 [ids], and the mean of all rows where that is -1."""
    new = rows.float().mean(0, keepdim=True).to(rows.dtype)
    return torch.where((order < 0).view(-1, *[1] * (rows.dim() - 1)), new, rows[order.clamp(min=0)])


def _vision(state: State, depth: int) -> State:
    """The vision encoder's tensors. BLIP normalises pictures by CLIP's mean and deviation, and ours lie in [-1, 1]: the
    patch projection's weight and bias make up for the difference."""
    theirs = "vision_model."
    weight, bias = (state[f"{theirs}embeddings.patch_embedding.{part}"] for part in ("weight", "bias"))
    mean, std = (torch.tensor(CLIP_LOOK[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    first = state[f"{theirs}embeddings.class_embedding"]
    ours = {
        "vision_embed.proj.weight": (weight / (2 * std)).flatten(1),
        "vision_embed.proj.bias": bias + (weight * ((0.5 - mean) / std)).flatten(1).sum(1),
        "vision_embed.cls_token": first,
        "vision_embed.mask_token": torch.zeros_like(first),
        "vision_embed.positions": state[f"{theirs}embeddings.position_embedding"][0],
        **_both(state, f"{theirs}post_layernorm", "norm.shared"),
    }
    for number in range(depth):
        block, own = f"{theirs}encoder.layers.{number}.", f"blocks.{number}."
        for name, new in VISION.items():
            ours |= _both(state, block + name, own + new)
        for part in ("weight", "bias"):
            thirds = state[f"{block}self_attn.qkv.{part}"].chunk(3)
            ours |= {
                f"{own}attention.{name}.shared.{part}": third.clone() for name, third in zip("qkv", thirds, strict=True)
            }
    return {f"image.{name}": value for name, value in ours.items()}
