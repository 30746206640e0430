"""ViLT's single stream (arXiv 2102.03334) as a Multiway encoder: one feed-forward network for all rows.

ViLT distinguishes words from patches by two learned rows, one added to all words behind their norm, the other to all
patches. Both are constants: the first is added to our text norm's bias, the second to our patches' positions. BERT's
row for the first of two texts is a constant too, and is added to every word's position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pretrain.contracts import State
from pretrain.models.multiway.config import MultiwayConfig

# Inside a block, transformers' names -> ours.
BLOCK = {
    "layernorm_before": "norm.shared",
    "attention.attention.query": "attention.q.shared",
    "attention.attention.key": "attention.k.shared",
    "attention.attention.value": "attention.v.shared",
    "attention.output.dense": "attention.out.shared",
    "layernorm_after": "experts.shared.norm",
    "intermediate.dense": "experts.shared.up",
    "output.dense": "experts.shared.down",
}


def vilt_config(config: Any, vocabulary: int) -> MultiwayConfig:
    """The model of a transformers.ViltConfig; `vocabulary` counts our ids."""
    return MultiwayConfig(
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        heads=config.num_attention_heads,
        ffn_dim=config.intermediate_size,
        image_size=config.image_size,
        patch_size=config.patch_size,
        vocab_size=vocabulary,
        max_text_len=config.max_position_embeddings,
        text_norm=True,
        norm_eps=config.layer_norm_eps,
        ffn="shared",
    )


def from_vilt(state: State, config: Any, own_ids: Sequence[int]) -> State:
    """Tensors of a transformers.ViltModel -> ours, for the encoder of `vilt_config`. `own_ids`: for each of our ids its
    row in ViLT's word table, -1 for a new id, which begins as the mean of all rows. KeyError where a tensor is missing.
    """
    words, types = "embeddings.text_embeddings.", state["embeddings.token_type_embeddings.weight"]
    table, order = state[f"{words}word_embeddings.weight"], torch.tensor(own_ids)
    chosen = torch.where(order.unsqueeze(1) < 0, table.mean(0, keepdim=True), table[order.clamp(min=0)])
    patches = state["embeddings.patch_embeddings.projection.weight"]
    ours = {
        "vision_embed.proj.weight": patches.reshape(len(patches), -1),
        "vision_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
        "vision_embed.cls_token": state["embeddings.cls_token"],
        "vision_embed.mask_token": torch.zeros_like(state["embeddings.cls_token"]),
        "vision_embed.positions": state["embeddings.position_embeddings"][0] + types[1],
        "text_embed.tokens.weight": chosen,
        "text_embed.positions": state[f"{words}position_embeddings.weight"]
        + state[f"{words}token_type_embeddings.weight"][0],
        "text_embed.norm.weight": state[f"{words}LayerNorm.weight"],
        "text_embed.norm.bias": state[f"{words}LayerNorm.bias"] + types[0],
    }
    for part in ("weight", "bias"):
        ours[f"norm.shared.{part}"] = state[f"layernorm.{part}"]
        for number in range(config.num_hidden_layers):
            for theirs, own in BLOCK.items():
                ours[f"blocks.{number}.{own}.{part}"] = state[f"encoder.layer.{number}.{theirs}.{part}"]
    return {f"encoder.{name}": value.contiguous() for name, value in ours.items()}
